
// Keeps one EventSource while the page is shown, and says in #state how it is.
// handlers: {name of an event: function of its data}; last: the id of the last event that the page knows of, if any.
function listen(address, handlers, last = "") {
  const state = document.getElementById("state");
  let source, timer;

  function show(text) {
    if (state.textContent !== text) state.textContent = text;
    document.documentElement.dataset.state = text;
  }

  function open() {
    // A new EventSource has to be told where the page was. What reconnects by itself knows better.
    source = new EventSource(last ? `${address}?last_event_id=${last}` : address);
    source.onopen = () => show("live");
    source.onerror = () => {
      show("reconnecting");
      // The browser tries again by itself, but gives up on an answer that is no stream (a proxy's 502, say).
      if (source.readyState === EventSource.CLOSED) {
        timer = setTimeout(open, 2000 + 2000 * Math.random()); // ms; spread, so that pages do not return all at once
      }
    };
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => {
        last = event.lastEventId || last;
        handle(event.data);
      });
    }
  }

  function close() {
    clearTimeout(timer);
    source?.close();
    show("connecting");
  }

  // A page left behind must not keep a connection (browsers have six for a host, all tabs together), and one
  // that is closed may rest in the back/forward cache: `pageshow` comes at the first load and at every return.
  addEventListener("pageshow", open);
  addEventListener("pagehide", close);
}

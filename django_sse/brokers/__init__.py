"""The outside systems that carry events between processes, interchangeable behind one contract (``base``)."""

"""How fast django-sse delivers, and how fast its peers do the same job: `python -m benchmarks`.

Imports go one way: cache and launch know nothing of the others; build and systems stand on them, publish alone;
measure puts one system on its bench; tables say what is done there; report and plot turn figures into text.
"""

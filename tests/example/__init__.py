"""The example project: its views in this process, its pages in a real browser on real servers."""

"""The public behaviour of django-sse 0.4.1 and sse 1.2, kept to the letter, each rule a test."""

"""Whether a smaller model is the function it should be: by structure, and by numbers."""

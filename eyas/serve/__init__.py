"""An OpenAI-compatible server over the same rounds as everywhere else: one thread decodes, the event loop talks."""

"""Comparing methods on prompts: reading prompts, timing methods interleaved, and showing what came out under which conditions."""

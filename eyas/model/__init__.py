"""The networks and what they compute: target, draft and their blocks, the cache, the mask. Reads no file."""

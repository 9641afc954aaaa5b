"""How products, attention and layers run: the native kernel, packed weights, passes captured as graphs. Knows no model."""

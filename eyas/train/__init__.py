"""Training a draft: conversations, features, the unroll, its losses and the loop around them."""

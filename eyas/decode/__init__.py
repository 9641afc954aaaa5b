"""The round and its parts: noise and the target's law, the tree, the walk, the drafter protocol. Knows no drafter."""

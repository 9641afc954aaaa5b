"""The round and its parts: noise and the target's distribution, the tree, the walk, the drafter protocol. Knows no drafter."""

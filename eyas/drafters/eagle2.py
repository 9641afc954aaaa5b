"""EAGLE-2 as a drafter (Li et al. 2024, arXiv 2406.16858): EAGLE-1's draft, whose own confidence says where the tree should grow.

EAGLE-1's tree has the same shape every round. EAGLE-2 found that the draft's probability of a token is close to the chance that it is
accepted, so the product along a path decides: the best nodes of each level are expanded, and the target reads the best of all. EAGLE-3
keeps this growth, which is in decode/grow.py. Only the tree differs from `eagle1`, and there is nothing to train.
"""

from __future__ import annotations

from eyas.drafters.eagle3 import Eagle3Drafter

drafter = Eagle3Drafter

"""EAGLE-2 as a drafter (Li et al. 2024, arXiv 2406.16858): EAGLE-1's draft, whose own confidence says where the tree should grow.

EAGLE-1 spends its rows on the same places every round. EAGLE-2 sees that the draft's probability of a token is close to the chance that it
is accepted, and lets the product along a path decide: the best nodes of each level are expanded, the best of all are checked. That growth
is decode/grow.py's, which EAGLE-3 keeps; so nothing but the tree differs from `eagle1`, and there is nothing to train.
"""

from __future__ import annotations

from eyas.drafters.eagle3 import Eagle3Drafter

drafter = Eagle3Drafter

"""Robust accuracy: one attack, the suite, AutoAttack, random search, and checks of them."""

"""Tests of the package against a real service. They need root and the program ``deltabox``."""

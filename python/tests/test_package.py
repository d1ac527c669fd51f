"""What can be tested without a service."""

from __future__ import annotations

import re
import unittest
from pathlib import Path

import deltabox
from deltabox import errors


class Package(unittest.TestCase):
    """The package against the rest of the repository."""

    def test_every_error_code_of_the_api_has_a_class(self) -> None:
        page = (Path(__file__).parents[2] / "docs/api.md").read_text()
        table = page.split("## Errors")[1].split("##")[0]
        codes = set(re.findall(r"`([a-z_]+)`", table))
        self.assertIn("no_sandbox", codes)
        general = {"no_route", "no_method", "failed", "bug", "no_thread"}
        for code in codes - general:
            error = errors.of_answer(400, code, "why")
            self.assertIsNot(deltabox.ApiError, type(error), code)
        for code in general:
            self.assertIs(deltabox.ApiError, type(errors.of_answer(500, code, "why")), code)

    def test_what_the_package_offers_is_there(self) -> None:
        for name in deltabox.__all__:
            self.assertTrue(hasattr(deltabox, name), name)


if __name__ == "__main__":
    unittest.main()

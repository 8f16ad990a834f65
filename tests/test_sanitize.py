"""What counts of a report of compute-sanitizer."""

from __future__ import annotations

from sanitize_cuda import own_hazards

OURS = """========= Error: Race reported between Write access at fastlora::product_kernel(int)+0xf600
=========     and Write access at fastlora::product_kernel(int)+0xa0e0 [23235 hazards]
=========     and Read access at fastlora::product_kernel(int)+0xf600 [64811 hazards]
"""
THEIRS = """========= Error: Race reported between Read access at nvjet_sm90_tst_32x64_64x16_4x1_v_bz_NTN+0xb00
=========     and Write access at nvjet_sm90_tst_32x64_64x16_4x1_v_bz_NTN+0x29e0 [128 hazards]
"""


NAMELESS = """========= Error: Race reported between Read access at
=========     and Write access at  [256 hazards]
"""


def test_only_hazards_of_own_kernels_count() -> None:
    (found,) = own_hazards(f"some text\n{THEIRS}=========\n{OURS}=========\n{THEIRS}")
    assert found.count("product_kernel") == 3
    assert "nvjet" not in found
    assert own_hazards(THEIRS) == []
    assert own_hazards(NAMELESS) == []

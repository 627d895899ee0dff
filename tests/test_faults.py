"""The faults of run_faults can be put back: what each replaces is in the source once, its tests exist."""

import pytest
from run_faults import FAULTS, REPOSITORY


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_can_be_put_back(fault):
    assert (REPOSITORY / fault.path).read_text(encoding="utf-8").count(fault.sound) == 1
    assert fault.sound != fault.broken
    assert (REPOSITORY / fault.tests.split()[0]).is_file()

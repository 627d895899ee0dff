"""What makes tests hold on every processor: the settings of `make test-hosts`, and tolerances by size."""

import pytest
import run_hosts as hosts
import torch
from fixtures_numbers import assert_close_at_scale
from run_hosts import INTEL, Outcome, Processor, all_settings, environment, main

OLD = Processor("AuthenticAMD", frozenset({"sse4_2", "avx2", "fma"}), ("X86_V3", "X86_V4"))


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Settings that ran, on a processor without AVX-512; none starts a process."""
    names = []
    monkeypatch.setattr(hosts, "read_processor", lambda: OLD)
    monkeypatch.setattr(hosts, "run_tests", lambda setting, tests: names.append(setting.name) or Outcome(7))
    return names


def test_settings_that_the_processor_cannot_do_are_left_out(ran, capsys):
    """And named with what is missing; the others run, and all is well."""
    assert main([]) == 0
    assert ran == ["own-2", "oldest-1", "oldest-2", "avx2-1", "avx2-2"]
    assert "avx512-2   left out: no avx512bw, avx512dq, avx512f, avx512vl here" in capsys.readouterr().out


@pytest.mark.parametrize("outcome", [Outcome(6, 1), Outcome(trouble="no effect: OMP_NUM_THREADS=2")])
def test_one_bad_setting_fails_the_whole_and_the_rest_still_runs(ran, monkeypatch, capsys, outcome):
    """A setting without effect would pass with the numbers of another."""
    run = hosts.run_tests
    monkeypatch.setattr(
        hosts, "run_tests", lambda setting, tests: (run(setting, tests), outcome)[setting.name == "own-2"]
    )
    assert main([]) == 1
    assert len(ran) == 5
    assert (outcome.trouble or "6       1") in capsys.readouterr().out


def test_a_library_that_does_not_report_the_value_is_named():
    """A typo in a variable would run the same numbers twice."""
    right = all_settings(OLD)[0]
    choices = {"OMP_NUM_THREADS": right.choices["OMP_NUM_THREADS"]._replace(report="threads 5\n")}
    assert hosts.variables_without_effect(right) == []
    assert "threads 5" in hosts.variables_without_effect(right._replace(choices=choices))[0]


def test_mkl_is_told_in_its_makers_words(monkeypatch):
    """Its instruction sets can be chosen on Intel's processors alone, others have one reproducible form."""
    monkeypatch.setenv("MKL_CBWR", "AVX2")  # of the user's shell
    oldest, avx2, intel = (
        environment(all_settings(processor)[number])
        for processor, number in ((OLD, 1), (OLD, 3), (OLD._replace(vendor=INTEL), 1))
    )
    assert oldest["MKL_CBWR"] == "COMPATIBLE" and "MKL_ENABLE_INSTRUCTIONS" not in oldest
    assert intel["MKL_ENABLE_INSTRUCTIONS"] == "SSE4_2" and "MKL_CBWR" not in intel
    assert "MKL_CBWR" not in avx2
    assert (oldest["NPY_DISABLE_CPU_FEATURES"], avx2["NPY_DISABLE_CPU_FEATURES"]) == (
        "X86_V3,X86_V4",
        "X86_V4",
    )


def test_a_unit_is_the_last_place_of_the_largest_number():
    """4,094 nats may differ by 5e-4 where 0.03 may not, and so may 1 beside them."""
    large = torch.tensor([4094.0, 1.0])
    assert_close_at_scale(large + 4.9e-4, large, units=2)
    small = torch.tensor([0.03])
    with pytest.raises(AssertionError, match="not close"):
        assert_close_at_scale(small + 1e-5, small, units=100)
    with pytest.raises(AssertionError, match="not close"):
        assert_close_at_scale(large + torch.tensor([0.0, 2e-3]), large, units=2)
    assert_close_at_scale(small.bfloat16(), small, units=1, dtype=torch.bfloat16)

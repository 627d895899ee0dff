"""What every command does with bad input and with a reader that leaves early."""

import subprocess
import sys

import pytest
from fixtures_model import ROOT


@pytest.mark.parametrize("last", ["print('x' * 100_000)", "sys.stdout.write('y' * 10)"])
def test_a_reader_that_has_read_enough_ends_a_command_without_a_word(last):
    """`COMMAND | head`: whether the pipe breaks while it prints or when the last lines are flushed."""
    code = (
        "import sys, time\nfrom common import run_command\n"
        f"def main():\n    print('first', flush=True)\n    time.sleep(0.5)\n    {last}\nrun_command(main)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"first\n"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141

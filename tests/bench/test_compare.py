"""Tests of compare with programs that only pretend: `python3 tests/bench/test_compare.py`."""

import json
import os
import subprocess
import sys
import tempfile
import unittest

COMPARE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compare")

# Logs its call and answers like both benchmarks. Speeds grow with each call, as if the machine became faster.
BENCH = """\
#!{python}
import json, os, sys
log, speed = os.path.join(os.path.dirname(sys.argv[0]), "log"), {speed}
option = dict(zip(sys.argv, sys.argv[1:]))
with open(log, "a") as file:
    file.write("{name} t%s d%s\\n" % (option["-t"], option["-d"]))
speed *= 1 + open(log).read().count("{name}")
tests = [(int(n), 0) for n in option["-p"].split(",") if n != "0"] + [(0, int(option["-n"]))]
print(json.dumps([dict(
    n_prompt=p, n_gen=g, avg_ts=speed, model_type="m", model_size=8, model_n_params=4,
    weight_bytes=10**9, state_bytes=5 * 10**8, limit_gb_per_s=speed * 4.0, gop_per_s=7.0 if p else None,
) for p, g in tests]))
"""
PROBE = "#!/bin/sh\necho membw >> \"${0%/*}/log\"\necho 'median 30.00 GB/s  best 40.00 GB/s'\n"


class Compare(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.write("tn", BENCH.format(python=sys.executable, name="tn", speed=6.0))
        self.write("peer", BENCH.format(python=sys.executable, name="peer", speed=3.0))
        self.write("membw", PROBE)
        self.write("m.gguf", "")

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.path(name), 0o755)

    def compare(self, *options, peer="peer"):
        command = [sys.executable, COMPARE, "--tn", self.path("tn"), "--model", self.path("m.gguf"), "--membw"]
        command += [self.path("membw"), "--peer", self.path(peer), "--peer-model", self.path("m.gguf"), *options]
        return subprocess.run(command, capture_output=True, text=True)

    def test_programs_take_turns(self):
        result = self.compare("--threads", "1", "--rounds", "2", "--depths", "0,9", "--peer-depths", "0")
        self.assertEqual(result.returncode, 0, result.stderr)
        with open(self.path("log"), encoding="utf-8") as file:
            log = file.read().splitlines()
        self.assertEqual(log, ["membw", "tn t1 d0", "peer t1 d0", "tn t1 d9"] * 2)

    def test_ratios_are_those_within_a_round(self):
        result = self.compare("--threads", "2", "--rounds", "3", "--depths", "0", "--json")
        prompt, generate = json.loads(result.stdout)["rows"]
        self.assertEqual((prompt["n_prompt"], generate["n_gen"], generate["threads"]), (512, 64, 2))
        self.assertEqual(generate["tn"], {"median": 18.0, "best": 24.0, "samples": [12.0, 18.0, 24.0]})
        self.assertEqual(generate["ratio"]["samples"], [2.0, 2.0, 2.0])
        self.assertEqual(generate["gb_per_s"]["median"], 36.0)
        self.assertEqual((generate["of_membw"]["median"], generate["of_limit"]["median"]), (0.9, 0.5))
        self.assertEqual((prompt["gop_per_s"]["median"], prompt["of_membw"]), (7.0, None))

    def test_the_table_leaves_out_what_was_not_measured(self):
        result = self.compare("--threads", "1", "--rounds", "1", "--prompt", "0", "--depths", "0,7", "--peer-depths", "0")
        lines = [line for line in result.stdout.splitlines() if line.startswith("| tg")]
        self.assertEqual(lines[0].split(" | ")[2:5], ["12.0 (12.0)", "6.0 (6.0)", "2.00×"])
        self.assertEqual(lines[1].split(" | ")[:5], ["| tg64 @ d7", "1", "18.0 (18.0)", "–", "–"])

    def test_what_is_missing_is_named(self):
        result = self.compare(peer="nowhere")
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        self.assertIn("--peer: " + self.path("nowhere") + ": no such file", result.stderr)
        result = self.compare(peer="m.gguf", *["--membw", self.path("log")])
        self.assertIn("--membw: " + self.path("log"), result.stderr)

    def test_a_program_that_fails_ends_the_run(self):
        self.write("peer", "#!/bin/sh\necho broken model >&2\nexit 3\n")
        result = self.compare()
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertIn("exit code 3\nbroken model", result.stderr)
        self.write("peer", "#!/bin/sh\necho '[]'\n")
        self.assertIn("unexpected output", self.compare().stderr)


if __name__ == "__main__":
    unittest.main()

"""Running what the README of an exported folder says."""

import os
import subprocess
import sys
import textwrap

# as conftest.py
BEFORE = """\
import sys
try:
    import torchaudio
except (ImportError, OSError):
    sys.modules["torchaudio"] = None
"""
AFTER = """
assert not [name for name in sys.modules if name.startswith("fairseq")]
"""


def run(folder, sentence, elsewhere):
    """What the snippet prints for a sentence, in a process that imports nothing of this project.

    Args:
        elsewhere: folder to run it in.
    """
    text = (folder / "README.md").read_text()
    code = text.split("## Use\n\n")[1].split("\n\n`")[0].split("\n## ")[0]
    code = textwrap.dedent(code)
    code = code.replace("PATH OF THIS FOLDER", str(folder)).replace('"..."', repr(sentence))
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code + AFTER],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={**os.environ, "HF_HOME": str(elsewhere), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]

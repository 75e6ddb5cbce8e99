"""The folder beside the new checkpoint in which a conversion keeps what it has done, so that the
same command goes on where it was interrupted."""

import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fairseq_smoe.checkpoints import files
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.folder import say
from fairseq_smoe.files import only_process_in, remove_unfinished, write_whole

KEY = "conversion.json"


class Work:
    """A work folder.

    Args:
        output: the checkpoint that will be written.
        key: of plain types; what is kept is used again only if this is the same.
    """

    def __init__(self, output, key):
        output = Path(output)
        self.folder = output.with_name(f"{output.name}.work")
        self._key = json.loads(json.dumps(key))

    @contextmanager
    def opened(self):
        """Lock the folder, and empty it if it belongs to another conversion.

        Raises:
            OptionError: it cannot be made, or another process has locked it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"{self.folder}: {error.strerror}; choose another OUTPUT") from error
        with ExitStack() as stack:
            try:
                stack.enter_context(only_process_in(self.folder))
            except OptionError as error:
                raise OptionError(
                    f"{self.folder}: another process converts there; wait for it or stop it"
                ) from error
            remove_unfinished(self.folder)
            self._begin()
            yield

    def _begin(self):
        path = self.folder / KEY
        if path.exists():
            if json.loads(path.read_text()) == self._key:
                return
            say(f"{self.folder}: of another checkpoint or with other options; begun anew")
            for other in self.folder.iterdir():
                if other.name != ".lock":
                    other.unlink()
        write_whole(path, json.dumps(self._key, indent=1))

    def result(self, i):
        """What has been kept of network ``i``; None if nothing has."""
        path = self._path(i)
        return files.read(path) if path.exists() else None

    def keep(self, i, result):
        files.write(result, self._path(i))

    def _path(self, i):
        return self.folder / f"ffn-{i}.pt"

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)

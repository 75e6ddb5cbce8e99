"""COMET, through the package unbabel-comet: optional, and not tried out yet."""

from pathlib import Path

from fairseq_smoe.errors import OptionError


class Comet:
    """100 times the mean COMET score.

    Args:
        model: name of a published model, or file of a checkpoint.

    Raises:
        OptionError: the package is missing.
    """

    def __init__(self, model):
        try:
            from comet import download_model, load_from_checkpoint
        except ImportError:
            raise OptionError(
                f"--comet {model}: the package unbabel-comet is missing; "
                'pip install "fairseq-smoe[comet]"'
            ) from None
        self.signature = f"model:{model}"
        self._model = load_from_checkpoint(
            model if Path(model).is_file() else download_model(model)
        )

    def score(self, sources, hypotheses, references):
        """Of lists of lines of text."""
        import torch

        sentences = [
            {"src": source, "mt": hypothesis, "ref": reference}
            for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True)
        ]
        gpus = int(torch.cuda.is_available())
        return 100 * self._model.predict(sentences, batch_size=16, gpus=gpus).system_score

"""The cost of collecting routing statistics while a model runs.

    python scripts/bench_analysis.py --checkpoint checkpoint_best.pt --direction en-de

Runs teacher-forced passes and beam search over a validation set, without and with the collector of
``python -m fairseq_smoe analyse``, in alternating rounds. Prints the median over the rounds of the
ratio of times, with / without. Without --checkpoint, an untrained SMoE of the paper's base size and
with --strata runs on random sentences.
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_smoe.analysis.collector import RoutingCollector  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", help="default: that of the training")
    parser.add_argument("--direction", help="default: the first of the training")
    parser.add_argument("--strata", default="2-2-2-2")
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=2000)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--max-len", type=int, default=60, help="longest translation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")

    model, dictionary, samples = from_checkpoint(args) if args.checkpoint else untrained(args)
    jobs = {
        "teacher-forced pass": lambda: teacher_forced(model, samples),
        f"beam search, beam {args.beam}": lambda: decode(model, dictionary, samples, args),
    }
    tokens = sum(int(sample["ntokens"]) for sample in samples)
    print(f"{args.sentences} sentences, {tokens} target tokens, {args.threads} threads")
    for name, job in jobs.items():
        job()  # warm up
        plain, ratios = [], []
        for _ in tqdm(range(args.rounds), desc=name):
            without = seconds(job)
            with RoutingCollector(model, len(dictionary)) as collector:
                counted = seconds(lambda: (job(), collector.take()))
            plain.append(without)
            ratios.append(counted / without)
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: {statistics.median(plain):.3f} s without; with / without: median "
            f"{median:.3f}, quartiles {low:.3f}-{high:.3f}"
        )


def seconds(job):
    """Seconds that a job takes. Without a GPU this is CPU time, which other processes disturb
    less."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    start = clock()
    job()
    wait()
    return clock() - start


@torch.no_grad()
def teacher_forced(model, samples):
    for sample in samples:
        model(**sample["net_input"], features_only=True)


def decode(model, dictionary, samples, args):
    from fairseq.sequence_generator import SequenceGenerator

    generator = SequenceGenerator([model], dictionary, beam_size=args.beam, max_len_b=args.max_len)
    for sample in samples:
        generator.generate([model], sample)


def from_checkpoint(args):
    from fairseq import utils

    from fairseq_smoe.analysis.passes import batches, direction_datasets, load_model

    model, task, _ = load_model(args.checkpoint, args.data)
    datasets = direction_datasets(task, "valid")
    dataset = datasets[args.direction or next(iter(datasets))]
    plan = batches(dataset, task.max_positions(), args.max_tokens, args.sentences)
    samples = [dataset.collater([dataset[i] for i in indices]) for indices in plan]
    if torch.cuda.is_available():
        samples = [utils.move_to_cuda(sample) for sample in samples]
    return model, task.target_dictionary, samples


def untrained(args):
    from fairseq import utils
    from fairseq.data import Dictionary, data_utils
    from fairseq.models import ARCH_CONFIG_REGISTRY

    import fairseq_smoe

    fairseq_smoe.register()
    from fairseq_smoe.translation.model import SMoETransformer
    from fairseq_smoe.translation.options import SMoETransformerOptions

    torch.manual_seed(1)
    dictionary = Dictionary()
    for i in range(32000):
        dictionary.add_symbol(str(i))
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    SMoETransformer.add_args(parser)
    given = parser.parse_args(["--smoe-strata", args.strata])
    ARCH_CONFIG_REGISTRY["smoe_transformer"](given)
    options = SMoETransformerOptions.from_namespace(given)
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = SMoETransformer.build_model(options, task).eval()
    lengths = torch.randint(10, 50, (args.sentences,)).sort().values.tolist()
    sentences = [torch.randint(4, 32000, (length,)) for length in lengths]
    per_batch = max(args.max_tokens // max(lengths), 1)
    samples = []
    for i in range(0, len(sentences), per_batch):
        tokens = data_utils.collate_tokens(sentences[i : i + per_batch], dictionary.pad())
        inputs = {
            "src_tokens": tokens,
            "src_lengths": tokens.ne(dictionary.pad()).sum(1),
            "prev_output_tokens": tokens,
        }
        samples.append({"net_input": inputs, "ntokens": tokens.ne(dictionary.pad()).sum()})
    if torch.cuda.is_available():
        model, samples = model.cuda(), utils.move_to_cuda(samples)
    return model, dictionary, samples


if __name__ == "__main__":
    main()

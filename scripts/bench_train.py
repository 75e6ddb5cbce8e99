"""Training steps of the rows of a table compared with those of its dense model.

Every step is a whole step of the trainer: forward, loss, backward, clipping, optimizer, logging. It
runs on made-up sentences of 10 to 50 words, with the options of `scripts/train.sh`. The row and the
dense model take turns in one process. Efficiency is tokens per second times FLOPs per token, both
relative to the dense model: 1 is as fast as dense arithmetic. Example:

    python scripts/bench_train.py --rows smoe-2-2-2-2 vanilla-moe --tokens 4096
"""

from benchmarking import build, compare_rows, make_parser

from fairseq_smoe.diagnosis.untrained import made_up_batch


def main():
    args = make_parser(__doc__, tokens=4096, rounds=5).parse_args()
    compare_rows(args, stepper, f"{args.tokens} tokens a step")


def stepper(benchmark, row, args, use_cuda):
    """A function that makes one update."""
    cfg, task, model, criterion = build(benchmark, row, args, use_cuda)
    from fairseq_smoe.training.trainer import SMoETrainer  # once fairseq knows the plugin

    trainer = SMoETrainer(cfg, task, model, criterion)
    batch = made_up_batch(task.source_dictionary, args.tokens, args.seed)
    return lambda: trainer.train_step([batch], raise_oom=True)


if __name__ == "__main__":
    main()

"""Turn gettext catalogues of installed or unpacked packages into a small parallel corpus.

Writes ``{train,valid,test}.en-XX.en`` and ``.XX`` for every language XX, one sentence per line.
"""

from pathlib import Path

from fairseq_smoe.preparation.catalogues import TEST_SHARE, make_corpus


def add_arguments(parser):
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="folder searched for LANGUAGE/LC_MESSAGES/*.po",
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--langs", required=True, help="languages as their folders are named: de,es,id,ru"
    )
    parser.add_argument(
        "--test-share",
        type=float,
        default=TEST_SHARE,
        metavar="FRACTION",
        help="of the longer texts, those of three words or more, to test on (default: %(default)s)",
    )


def run(args):
    make_corpus(Path(args.source), Path(args.to), args.langs.split(","), args.test_share)

"""Two machines of two ranks each, as network namespaces with a virtual cable between them."""

import os
import re
import subprocess
import time

import pytest
from test_survival import STEP, Training, loaded_update, losses
from toy_task import train_command

TIMEOUT = 10  # seconds that ranks wait for each other
MAX_UPDATE = 40
# in the namespaces, which nothing else can see
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces, of the interface in each, joined by a cable."""
    names = [f"smoe-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "-n",
            names[0],
            "link",
            "add",
            "cable",
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        remove(names)
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield names
    remove(names)


def remove(names):
    for name in names:
        ip("netns", "delete", name, check=False)


def launch(hosts, data, folder, port):
    """The same command on both machines."""
    train = train_command(
        data,
        folder / "run",
        *("--smoe-strata", "2-2-2-2"),
        max_update=MAX_UPDATE,
        save_interval_updates=STEP,
        keep_interval_updates=1,
        log_interval=1,
        disable_validation=True,
        distributed_timeout=TIMEOUT,
    )
    return [
        Training(
            [
                *("ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=cable"),
                *("unshare", "--uts", "sh", "-c", f'hostname machine-{i}; exec "$@"', "sh"),
                *("torchrun", "--nnodes", "2", "--node_rank", i, "--nproc_per_node", "2"),
                *("--master_addr", ADDRESSES[0], "--master_port", port, "--no-python", *train),
            ],
            folder / f"log-{i}",
        )
        for i, host in enumerate(hosts)
    ]


@pytest.mark.slow
def test_two_hosts_train_and_end_when_the_cable_is_cut(hosts, data, tmp_path):
    sides = launch(hosts, data, tmp_path, 29511)
    sides[0].wait_for_update(STEP + 2)
    ip("-n", hosts[0], "link", "set", "cable", "down")
    cut = time.monotonic()
    outcomes = [side.wait(90) for side in sides]
    assert time.monotonic() - cut < 3 * TIMEOUT + 30
    assert all(outcome.returncode not in (0, None) for outcome in outcomes)
    # each side names who is on the other
    first, second = (outcome.stdout for outcome in outcomes)
    assert re.search(
        r"error: rank [01]: rank 2 \(machine-1\), rank 3 \(machine-1\) have died or cannot", first
    ), outcomes[0].tail(80)
    assert re.search(r"error: rank [23]: the machine of rank 0, .* cannot be reached", second), (
        outcomes[1].tail(80)
    )

    ip("-n", hosts[0], "link", "set", "cable", "up")
    sides = launch(hosts, data, tmp_path, 29512)
    outcomes = [side.wait(120) for side in sides]
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes[0].tail()
    assert loaded_update(outcomes[0]) >= STEP
    assert max(losses(outcomes[0].stdout)) == MAX_UPDATE

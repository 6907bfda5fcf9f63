"""Processes that wait in vain for one another end in a sentence, and with a status that has them started again."""

import socket

import pytest
from processes import finish, start

from difffract_jax.transcoders import deadlines
from difffract_jax.transcoders.settings import TRY_AGAIN

# Each as JAX 0.10 says it; the first two without the stack trace behind them.
NOBODY_CAME = (
    "Terminating process because the JAX distributed service detected fatal errors. absl::Status: DEADLINE_EXCEEDED: "
    "Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask"
)
FIRST_IS_GONE = (
    "Terminating process because the JAX distributed service detected fatal errors. absl::Status: UNAVAILABLE: failed "
    "to connect to all addresses"
)
GLOO = (
    "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: "
    "cpu:gloo/0,2048/1 and duration: 29.99999994s [type.googleapis.com/tensorflow.CoordinationServiceError='']"
)
DEVICES = (
    "Unable to initialize backend 'cpu': DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:local_topology/cpu/1 "
    "and duration: 2m"
)
CUT_OFF = "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error: Connection reset"
JOIN = "host0:1234,1,4"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            NOBODY_CAME,
            "Not all 4 processes came to host0:1234 within 300 s, and process 1 waits no longer; they must be ",
        ),
        (
            GLOO,
            "Not all 4 processes came to their first shared computation within 30 s, and process 1 waits no longer; ",
        ),
        (DEVICES, "Not all 4 processes came to their first shared computation within 120 s, and process 1 waits no "),
        (FIRST_IS_GONE, "Another of all 4 processes had ended when process 1 came to their first shared computation"),
        (CUT_OFF, "Another of all 4 processes had ended when process 1 came to their first shared computation"),
    ],
)
def test_it_says_what_did_not_happen_how_long_it_waited_and_for_how_many(said: str, told: str) -> None:
    sentence = deadlines.not_together(said, JOIN)
    assert sentence is not None and sentence.startswith(told) and "\n" not in sentence


@pytest.mark.parametrize(
    "said",
    [
        "INVALID_ARGUMENT: shapes differ",
        "Unable to initialize backend 'tpu': UNAVAILABLE: /dev/accel0: Device or resource busy",
        "Unable to initialize backend 'cuda': DEADLINE_EXCEEDED: driver",
        "the kernel failed with duration: 3s",
    ],
)
def test_another_error_is_none_of_a_deadline(said: str) -> None:
    assert deadlines.not_together(said, JOIN) is None
    assert not deadlines.is_deadline(said)


def test_where_jax_finds_the_others_and_has_not_yet_no_number_is_made_up() -> None:
    told = deadlines.not_together(NOBODY_CAME, "auto")
    assert told is not None and told.startswith("Not all processes came together within 300 s, and this process waits")


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (GLOO, 30.0),
        (DEVICES, 120.0),
        ("DEADLINE_EXCEEDED: duration: 1m30.5s", 90.5),
        ("Timed out waiting 1800000ms for recv", 1800.0),
    ],
)
def test_durations_are_read_as_c_writes_them(said: str, seconds: float) -> None:
    assert deadlines.waited(said) == seconds and deadlines.is_deadline(said)
    assert deadlines.waited(NOBODY_CAME) is None


@pytest.fixture
def place() -> str:
    """Returns an address of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def begin(place, log, number, command, **how):
    """Starts one of two processes of a command, which has nothing to read: it ends before that."""
    given = {"train": ("--set", "model=m", "--set", "prompts=p"), "harvest": ("--set", "model=m", "--set", "prompts=p")}
    out = ("--set", f"out={log.parent / 'out'}") if command in given else (log.parent / "run",)
    join = ("--join", f"{place},{number},2")
    return start((command, *given.get(command, ()), *out, *join), log, cache=log.parent / "cache", adds=False, **how)


@pytest.mark.parametrize("command", ["train", pytest.param("harvest", marks=pytest.mark.slow)])
def test_a_process_that_nobody_joins_ends_in_one_sentence(place, tmp_path, command) -> None:
    status, said = finish(begin(place, tmp_path / "alone", 0, command, start_up=1), tmp_path / "alone")
    assert (status, said.count("\n")) == (1, 1), said
    assert said.startswith(f"Error: Not all 2 processes came to {place} within 1 s, and process 0 waits no longer; ")
    assert "; nothing was saved; start all again with: difffract" in said and f"--join {place},0,2" in said


@pytest.mark.slow
def test_a_process_that_waits_for_a_late_one_ends_in_one_sentence_and_so_does_the_late_one(place, tmp_path) -> None:
    processes = [begin(place, tmp_path / "0", 0, "train", fails=(0, GLOO)), begin(place, tmp_path / "1", 1, "train")]
    waits, late = (finish(each, tmp_path / str(n)) for n, each in enumerate(processes))
    assert waits[0] == 1 and waits[1].startswith(
        "Error: Not all 2 processes came to their first shared computation within 30 s, and process 0 waits no longer; "
    )
    assert late[0] == 1 and late[1].startswith("Error: Another of all 2 processes had ended when process 1 came to ")
    assert waits[1].count("\n") == late[1].count("\n") == 1, (waits, late)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_that_waits_in_vain_later_ends_all_of_them(which, place, tmp_path) -> None:
    processes = [
        begin(place, tmp_path / str(n), n, "train", fails=(5, GLOO) if n == which else None, supervised=True)
        for n in range(2)
    ]
    ended = [finish(each, tmp_path / str(n)) for n, each in enumerate(processes)]
    waits, other = ended[which], ended[1 - which]
    assert waits[1].startswith(
        f"Error: Process {which} on {socket.gethostname()} has waited for 30 s in vain for another "
    )
    assert ", which ends all 2 processes; nothing was saved; start all again with: difffract train" in waits[1]
    assert waits[1].count("\n") == 1 and other[1] == "", "the one that has waited tells it for all"
    assert waits[0] == other[0] == TRY_AGAIN, "so that all are started again"

"""How long stages take and how much disk they need: from what stages of the same kind took here, or from a first guess.

The guess is of the tiny scale on one core of an Intel Xeon, and says little of other machines. As soon as a stage of a
kind is done its own time per unit of work takes the guess's place.
"""

START = 25.0  # seconds of a command that are no work: imports, what is not compiled yet
# Kind of work -> seconds for one unit of it.
GUESSES = {
    "classifier": 480.0,
    "sdvae step": 0.2,
    "sdvae EQ step": 0.15,
    "vqgan step": 0.25,
    "vqgan EQ step": 0.2,
    "encoded image": 0.003,
    "decoded image": 0.004,
    "classified image": 0.001,
    "dit step": 0.13,
    "sit step": 0.13,
    "repa step": 0.25,
    "maskgit step": 0.55,
    "dit sample": 0.008,
    "sit sample": 0.016,
    "repa sample": 0.016,
    "maskgit sample": 0.04,
    "report": 30.0,
}


def rates(records):
    """{kind: seconds a unit} from the records of stages that are done, oldest first; the newest of a kind counts.

    Those of several attempts do not: what the later ones found done is in no clock.
    """
    found = {}
    for record in records:
        if record.get("attempts", 1) > 1:
            continue
        kind, amount = record["work"]
        found[kind] = max(0.0, record["seconds"] - START) / amount
    return found


def seconds(stage, rates=None):
    """Seconds that a stage takes, about; None where nothing is known of its kind."""
    kind, amount = stage.work
    rate = (rates or {}).get(kind, GUESSES.get(kind))
    return None if rate is None else START + rate * amount


def disk(stages):
    """Bytes that stages leave, about."""
    return sum(stage.disk for stage in stages)

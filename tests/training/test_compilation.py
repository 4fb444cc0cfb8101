import threading

import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.training.compilation import CompileLedger, WarmUp


def test_the_ledger_counts_programs_and_only_inside_with():
    @jax.jit
    def doubled(x):
        return 2 * x

    inputs = [np.arange(n, dtype=np.float32) for n in (2, 3, 3)]
    with CompileLedger() as ledger:
        for x in inputs:
            doubled(x)
    assert ledger.programs == 2 and ledger.seconds > 0
    assert [count for name, count in ledger.names.items() if "doubled" in name] == [2]
    doubled(np.arange(4, dtype=np.float32))
    assert ledger.programs == 2
    assert str(ledger).startswith("compiled 2 programs in ")


def test_what_was_warmed_up_is_not_compiled_again():
    @jax.jit
    def cubed(x):
        return jnp.sum(x ** 3)

    said, main = [], threading.get_ident()
    threads = []

    def program(n):
        def compile_one():
            threads.append(threading.get_ident())
            cubed.lower(jax.ShapeDtypeStruct((n,), jnp.float32)).compile()
        return f"cubed {n}", compile_one

    with WarmUp(said.append) as warm_up:
        warm_up.start(program(n) for n in (2, 3))
        warm_up.join()
        with CompileLedger() as ledger:
            assert float(cubed(np.array([1, 2], np.float32))) == 9
            assert float(cubed(np.array([1, 2, 3], np.float32))) == 36
    assert ledger.programs == 0
    assert main not in threads and said[0].startswith("compiled 2 programs ahead in ")


def test_a_failure_is_said_and_stops_nothing():
    def fail():
        raise FloatingPointError("not this one")

    said = []
    with WarmUp(said.append) as warm_up:
        warm_up.start(iter([("scale 8", fail)]))
        warm_up.join()
    assert said == ["compiling scale 8 ahead failed (FloatingPointError: not this one); "
                    "training goes on without"]


def test_leaving_waits_for_the_program_under_way_and_starts_no_other():
    begun, go, done = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        go.wait(10)
        done.append("slow")

    with WarmUp(print) as warm_up:
        warm_up.start(iter([("slow", slow), ("never", lambda: done.append("never"))]))
        begun.wait(10)
        threading.Timer(0.1, go.set).start()
    assert done == ["slow"]

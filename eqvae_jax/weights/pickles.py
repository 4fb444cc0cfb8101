"""Read pickles as data: an interpreter of the pickle language in which nothing can run.

Python's own unpickler imports and calls whatever a file names. Told which names to allow, it still sets attributes on
them and allocates what a file claims to hold. Here a name is only ever a name. A call builds a value if its name is in
the caller's table, and an inert `Placeholder` otherwise; state given to a placeholder is dropped.
Tokens come from `pickletools.genops`, which checks every length against what is left of the file.
"""

import dataclasses
import pickletools

from eqvae_jax.weights.errors import WeightsError


@dataclasses.dataclass(frozen=True)
class Name:
    """A global that a pickle names."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Placeholder:
    """What stands where a pickle would have made an object of an unknown class."""

    of: str


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
ARGUMENTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}
SMALL_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()


def read_pickle(file, builders, load_persistent):
    """The value of the pickle at the position of `file`, which is left behind its last byte.

    file: binary, with read and readline that return no more than there is (BytesIO, mmap). builders: "module.name" ->
    function of the call's arguments. load_persistent: function of a persistent identifier (storages, in torch's files).
    Raises WeightsError for anything that is not a well-formed pickle of data.
    """
    try:
        return run(pickletools.genops(file), builders, load_persistent)
    except WeightsError:
        raise
    # Whatever a hostile file makes go wrong (types, indices, numbers, memory) is the file's fault.
    except Exception as error:
        raise WeightsError(f"malformed pickle ({type(error).__name__}: {error})") from error


def run(operations, builders, load_persistent):
    stack, memo = [], {}

    def pop_to_mark():
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise WeightsError("malformed pickle (no mark)")
        items = stack[at + 1:]
        del stack[at:]
        return items

    def pop():
        value = stack.pop()
        if value is MARK:
            raise WeightsError("malformed pickle (a mark where a value belongs)")
        return value

    def call(function, arguments):
        if not isinstance(arguments, tuple):
            raise WeightsError("malformed pickle (arguments are not a tuple)")
        if isinstance(function, Name) and str(function) in builders:
            return builders[str(function)](*arguments)
        # Never str() of anything else: text of a list that holds itself many times over could fill the memory.
        if isinstance(function, Placeholder):
            return Placeholder(function.of)
        return Placeholder(str(function) if isinstance(function, Name) else type(function).__name__)

    for operation, argument, _ in operations:
        op = operation.name
        if op in ("PROTO", "FRAME"):
            continue
        if op == "STOP":
            value = pop()
            if stack:
                raise WeightsError("malformed pickle (values left over)")
            return value

        if op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in ARGUMENTS:
            stack.append(argument)
        elif op in EMPTY:
            stack.append(EMPTY[op]())
        elif op == "MARK":
            stack.append(MARK)
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            pop_to_mark()
        elif op == "DUP":
            stack.append(stack[-1])

        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])

        elif op in SMALL_TUPLES:
            items = [pop() for _ in range(SMALL_TUPLES[op])]
            stack.append(tuple(reversed(items)))
        elif op == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif op == "LIST":
            stack.append(pop_to_mark())
        elif op == "DICT":
            stack.append(fill({}, pop_to_mark()))
        elif op == "FROZENSET":
            stack.append(frozenset(map(hashable, pop_to_mark())))
        elif op == "APPEND":
            item = pop()
            extend(stack[-1], [item])
        elif op == "APPENDS":
            items = pop_to_mark()
            extend(stack[-1], items)
        elif op == "SETITEM":
            item, key = pop(), pop()
            fill(stack[-1], [key, item])
        elif op == "SETITEMS":
            items = pop_to_mark()
            fill(stack[-1], items)
        elif op == "ADDITEMS":
            items = pop_to_mark()
            if isinstance(stack[-1], set):
                stack[-1].update(map(hashable, items))

        elif op == "GLOBAL":
            module, _, name = argument.partition(" ")
            stack.append(Name(module, name))
        elif op == "STACK_GLOBAL":
            name, module = pop(), pop()
            if not (isinstance(name, str) and isinstance(module, str)):
                raise WeightsError("malformed pickle (a global's name is not text)")
            stack.append(Name(module, name))
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, function = pop(), pop()
            stack.append(call(function, arguments))
        elif op == "NEWOBJ_EX":
            _, arguments, function = pop(), pop(), pop()
            stack.append(call(function, arguments))
        elif op == "OBJ":
            function, *arguments = pop_to_mark()
            stack.append(call(function, tuple(arguments)))
        elif op == "INST":
            module, _, name = argument.partition(" ")
            stack.append(call(Name(module, name), tuple(pop_to_mark())))
        elif op == "BUILD":
            state = pop()
            if hasattr(type(stack[-1]), "set_pickled_state"):        # only the table's own values have this method
                stack[-1].set_pickled_state(state)
        elif op == "BINPERSID":
            stack.append(load_persistent(pop()))
        else:
            raise WeightsError(f"the pickle uses {op}, which files of weights have no use for")
    raise WeightsError("malformed pickle (it ends too early)")


def extend(target, items):
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Placeholder):
        raise WeightsError(f"malformed pickle (items appended to a {type(target).__name__})")


def fill(target, items):
    if len(items) % 2:
        raise WeightsError("malformed pickle (a key without a value)")
    if isinstance(target, dict):
        target.update((hashable(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
    elif not isinstance(target, Placeholder):
        raise WeightsError(f"malformed pickle (items set on a {type(target).__name__})")
    return target


def hashable(key):
    """The key itself if hashing it is cheap; hashing tuples nested a million deep would overflow the C stack."""
    if isinstance(key, tuple) and any(isinstance(item, (tuple, frozenset)) for item in key):
        return Placeholder("tuple")
    return key

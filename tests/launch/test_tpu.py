"""TPU VMs: gcloud is a fake, whose hosts are directories, or which plays a story of states."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from fakes import HOSTILE, ROOT, calls, fake, on_path, read, run, toy, until


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with the launchers as they are now: what is sent to hosts is a commit."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", root)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], cwd=root, check=True)
    return root


def tpu(checkout, *arguments, **variables):
    return run(checkout / "launch/tpu.sh", *arguments, cwd="/", **variables)


def test_tpu_create_and_delete_are_these_commands(checkout):
    zone = ["--zone=us-east5-a", "--dry-run"]
    create = lambda *more: tpu(checkout, "create", "eq-1", *zone, *more)[1]
    assert create("--type=v5litepod-16", "--spot", "--project=p") == (
        "gcloud compute tpus queued-resources create eq-1 --node-id=eq-1 --zone=us-east5-a --project=p "
        "--accelerator-type=v5litepod-16 --spot --runtime-version=v2-alpha-tpuv5-lite\n")
    assert create("--type=v4-8", "--direct", "--gcloud=--network=my net") == (
        "gcloud compute tpus tpu-vm create eq-1 --zone=us-east5-a --accelerator-type=v4-8 "
        "--version=tpu-ubuntu2204-base --network=my\\ net\n")
    for kind, version in (("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v2-8", "tpu-ubuntu2204-base")):
        assert create(f"--type={kind}").endswith(f"--runtime-version={version}\n")
    assert create("--type=v9-8", "--version=own").endswith("--runtime-version=own\n")
    assert "costs money" in tpu(checkout, "create", "eq-1", *zone, "--type=v4-8")[2]
    assert tpu(checkout, "delete", "eq-1", *zone)[1] == (
        "gcloud compute tpus queued-resources delete eq-1 --zone=us-east5-a --quiet --force\n")
    assert tpu(checkout, "attach", "eq-1", *zone, "--worker=3", "--ssh=--tunnel-through-iap")[1] == (
        "gcloud compute tpus tpu-vm ssh eq-1 --zone=us-east5-a --worker=3 --command=tail\\ -n\\ 100\\ -F\\ eqvae/log "
        "--tunnel-through-iap\n")


def test_tpu_delete_asks(checkout, tmp_path):
    path = fake(tmp_path / "bin", "gcloud", "")
    status, _, errors = tpu(checkout, "delete", "a", "--zone=z", PATH=on_path(path))
    assert status == 2 and "--yes" in errors and not (path / "log").exists()
    assert tpu(checkout, "delete", "a", "--zone=z", "--yes", "--direct", PATH=on_path(path))[0] == 0
    assert calls(path) == [["gcloud", *"compute tpus tpu-vm delete a --zone=z --quiet".split()]]


@pytest.fixture
def hosts(tmp_path):
    """A gcloud whose TPU is two directories: scp copies into them, ssh runs in them. DIRECTORY/states: of describe."""
    for n in range(2):
        (tmp_path / f"host{n}").mkdir()
        # where the environment is made: the interpreter of these tests, and no package installed
        fake(tmp_path / f"host{n}/bin", "uv", f"""\
            if [ "$1" = venv ]; then mkdir -p venv/bin && ln -s {shlex.quote(sys.executable)} venv/bin/python; fi
            """)
    path = fake(tmp_path / "bin", "gcloud", """\
        case "$*" in
          *" describe "*)
            state=$(next states)
            if [ "$state" = ABSENT ]; then echo "ERROR: NOT_FOUND: not found" >&2; exit 1; fi
            if [ "$state" = DENIED ]; then echo "ERROR: permission denied" >&2; exit 1; fi
            echo "$state" ;;
          *" scp "*) for n in 0 1; do cp "$5" "$here/../host$n/${6#*:}"; done ;;
          *" ssh "*)
            for word in "$@"; do case "$word" in --command=*) line="${word#*=}" ;; esac; done
            for n in 0 1; do
              cd "$here/../host$n"
              HOME="$PWD" PATH="$PWD/bin:$PATH" bash -c "$line" || exit 255
            done ;;
        esac
        """)
    (path / "states").write_text("ACTIVE\n")
    return path


def test_tpu_run_status_stop_on_two_hosts(checkout, hosts, tmp_path):
    command = toy(tmp_path, """\
        me = pathlib.Path(os.environ["HOME"]).name
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        (at / f"ran-{me}").write_text("\\0".join([os.getcwd(), os.environ["JAX_COORDINATOR_PORT"], *sys.argv[1:]]))
        time.sleep(60)
        """)
    with_gcloud = {"PATH": on_path(hosts)}
    (hosts / "states").write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
    status, _, errors = tpu(checkout, "run", "a", "--zone=z", "--poll=0", "--", "bash", "-c", 'exec "$@"', "_",
                            *command, *HOSTILE, **with_gcloud)
    assert status == 0 and "a is WAITING_FOR_RESOURCES" in errors and "hosts share no directory" in errors
    until(lambda: len(list(tmp_path.glob("ran-*"))) == 2)
    ask = lambda: tpu(checkout, "status", "a", "--zone=z", **with_gcloud)[1]
    assert re.fullmatch(r"a ACTIVE\n(eqvae \S+ running \d+\n){2}", ask())
    for n in range(2):
        home = tmp_path / f"host{n}"
        assert (tmp_path / f"ran-host{n}").read_text().split("\0") == [f"{home}/eqvae/source", "8476", *HOSTILE]
        assert (home / "eqvae/source/setup.py").exists()
        assert (home / "bin/log").read_text().splitlines()[1].startswith("uv pip install") and "source\\[tpu\\]" in (
            home / "bin/log").read_text()
    status, _, errors = tpu(checkout, "run", "a", "--zone=z", "--", "x", **with_gcloud)
    assert status != 0 and "a command runs on" in errors  # and its source is still there
    assert (tmp_path / "host0/eqvae/source/setup.py").exists()
    assert tpu(checkout, "stop", "a", "--zone=z", **with_gcloud)[0] == 0
    until(lambda: ask().count(" asked 0") == 2)
    # a host whose launcher vanished with nothing written
    (tmp_path / "host1/eqvae/state").write_text("running 999999999\n")
    assert " lost" in ask()


def test_tpu_clone_and_bucket_are_these_lines(checkout):
    commit = run("git", "rev-parse", "HEAD", cwd=checkout)[1].strip()
    shown = tpu(checkout, "run", "a", "--zone=z", "--clone=https://x/y z", "--bucket=b", "--mount=/mnt/a b",
                "--restarts=3", "--dry-run", "--", "python", *HOSTILE)[1].splitlines()
    there = [read(line)[-1].removeprefix("--command=") for line in shown]  # what the hosts' shells get
    worker = "eqvae/source/launch/tpu_worker.sh"
    assert there[0].endswith("&& git clone --quiet -- https://x/y\\ z eqvae/source "
                             f"&& git -C eqvae/source checkout --quiet {commit}")
    assert [read(line) for line in there[1:]] == [
        [worker, "install"], [worker, "mount", "b", "/mnt/a b"],
        [worker, "start", "--restarts=3", "--", "python", *HOSTILE]]


def test_tpu_worker_mounts_a_bucket_once_and_never_over_another(tmp_path, checkout):
    shutil.copytree(checkout, tmp_path / "eqvae/source", ignore=shutil.ignore_patterns(".git"))
    path = fake(tmp_path / "bin", "gcsfuse", 'touch "$here/mounted"')
    fake(path, "sudo", '"$@"')
    fake(path, "mountpoint", '[ -e "$here/mounted" ]')
    fake(path, "findmnt", "echo b")
    mount = [tmp_path / "eqvae/source/launch/tpu_worker.sh", "mount"]
    assert run(*mount, "b", tmp_path / "m t", PATH=on_path(path))[0] == 0 and (tmp_path / "m t").is_dir()
    flags = next(call for call in calls(path) if call[0] == "gcsfuse")
    assert flags[-2:] == ["b", str(tmp_path / "m t")]
    assert {"--implicit-dirs", "--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"} < set(flags)
    assert any(flag.startswith("--rename-dir-limit=") for flag in flags)
    (path / "log").unlink()
    assert run(*mount, "b", tmp_path / "m t", PATH=on_path(path))[0] == 0
    assert run(*mount, "c", tmp_path / "m t", PATH=on_path(path))[0] == 2
    assert not any(call[0] == "gcsfuse" for call in calls(path))


@pytest.fixture
def cloud(tmp_path):
    """A gcloud that plays a story: a line of `states` at each describe, of `census` at each status of the command."""
    path = fake(tmp_path / "bin", "gcloud", """\
        case "$*" in
          *" describe "*)
            state=$(next states)
            case "$state" in
              ABSENT) echo "ERROR: NOT_FOUND: not found" >&2; exit 1 ;;
              DENIED) echo "ERROR: permission denied" >&2; exit 1 ;;
            esac
            echo "$state" ;;
          *"tpu_worker.sh status")
            line=$(next census)
            [ "$line" != UNREACHABLE ] || exit 255
            printf 'SSH: Attempting to connect to worker 0...\\n' >&2
            n=0; IFS='|'; for state in $line; do echo "eqvae host$n $state"; n=$((n + 1)); done ;;
          *"$(cat "$here/failing" 2>/dev/null || echo nothing-fails)"*) rm -f "$here/failing"; exit 1 ;;
        esac
        """)

    def watch(checkout, states, census, *options):
        (path / "states").write_text("\n".join(states) + "\n")
        (path / "census").write_text("\n".join(census) + "\n")
        (path / "log").write_text("")
        status, _, errors = tpu(checkout, "watch", "a", "--zone=z", "--type=v6e-16", "--spot", "--pause=0", "--poll=0",
                                "--bucket=b", "--mount=/m", *options, "--", "train", "--x=$y", PATH=on_path(path))
        known = r"queued-resources (\w+)|tpu-vm (create|delete|describe)|(scp)|tpu_worker.sh\S* (\w+)|(tail) "
        words = [re.search(known, call)
                 for call in (path / "log").read_text().replace("\\ ", " ").splitlines()]
        done = [next(filter(None, word.groups())) for word in words]
        return status, [word for word in done if word not in ("describe", "status")], errors

    watch.path = path
    return watch


DEPLOY = ["scp", "idle", "install", "mount", "start"]


def test_tpu_watch_creates_again_what_was_taken_away(checkout, cloud):
    status, done, errors = cloud(
        checkout, ["ABSENT", "ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE",
                   "SUSPENDING", "SUSPENDED", "ABSENT", "PROVISIONING", "ACTIVE"],
        ["running 7|running 8", "stopped 0|running 8", "running 7|running 8", "ended 0|running 8", "ended 0|ended 0"])
    assert status == 0, errors
    assert done == ["create", *DEPLOY, "delete", "create", *DEPLOY]
    assert "a is SUSPENDED; restart 1 of 20" in errors and "finished" in errors and "still costs money" in errors
    create, delete = (next(call for call in calls(cloud.path) if word in call) for word in ("create", "delete"))
    assert create[3:] == ["queued-resources", "create", "a", "--node-id=a", "--zone=z", "--accelerator-type=v6e-16",
                          "--spot", "--runtime-version=v2-alpha-tpuv6e"]
    assert delete[3:] == ["queued-resources", "delete", "a", "--zone=z", "--quiet", "--force"]


def test_tpu_watch_starts_again_what_ended_on_a_tpu_that_is_there(checkout, cloud):
    status, done, errors = cloud(checkout, ["ACTIVE"], [
        "none|none", "running 7|lost", "running 7|lost", "running 7|lost", "ended 0|ended 0"], "--then-delete")
    assert status == 0 and done == [*DEPLOY, "end", *DEPLOY, "delete"]
    # restarts used up there, an unreachable host, a start that failed
    (cloud.path / "failing").write_text("install")
    status, done, errors = cloud(checkout, ["ACTIVE"], [
        "UNREACHABLE", "ended 75|ended 137", "ended 75|ended 137", "UNREACHABLE", "ended 0|ended 0"])
    assert status == 0 and done == [*DEPLOY[:3], "end", *DEPLOY, "end", *DEPLOY] and "restart 2 of 20" in errors


def test_tpu_watch_without_the_queue(checkout, cloud):
    status, done, errors = cloud(
        checkout, ["ABSENT", "ABSENT", "READY", "READY", "PREEMPTED", "ABSENT", "READY"],
        ["running 7", "ended 0"], "--direct")
    assert status == 0 and done == ["create", *DEPLOY, "delete", "create", *DEPLOY], errors
    delete = next(call for call in calls(cloud.path) if "delete" in call)
    assert delete[3:] == ["tpu-vm", "delete", "a", "--zone=z", "--quiet"]


@pytest.mark.parametrize("census, code", [("ended 1|running 8", 1), ("ended 75|ended 2", 2), ("ended 130|lost", 130)])
def test_tpu_watch_stops_where_a_person_must_look(checkout, cloud, census, code):
    status, done, errors = cloud(checkout, ["ACTIVE"], ["running 7|running 8", census])
    assert status == code and done == ["end", "tail"] and f"failed with {code}" in errors  # it adopted what ran


def test_tpu_watch_ends_when_a_person_stopped_the_command(checkout, cloud):
    status, done, errors = cloud(checkout, ["ACTIVE"], [
        "running 7|running 8", "asked 0|running 8", "asked 0|asked 0"], "--then-delete")
    assert status == 0 and done == ["delete"] and "stopped, as asked" in errors
    assert (cloud.path / "log").read_text().count("tpu_worker.sh\\ status") == 3  # it waited for the other host


def test_tpu_watch_gives_up_after_so_many_restarts(checkout, cloud):
    status, done, errors = cloud(checkout, ["FAILED"], ["none"], "--restarts=2")
    assert status == 75 and done == ["delete", "delete"] and "2 restarts did not help" in errors
    status, done, errors = cloud(checkout, ["DENIED"], ["none"])
    assert status == 2 and done == [] and "permission denied" in errors
    status, done, errors = cloud(checkout, ["ABSENT", "DENIED"], ["none"], "--restarts=2")
    assert status == 75 and done == [] and "gcloud does not answer" in errors

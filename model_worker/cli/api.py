"""`fot api`: a model for clients that hold none, over OpenAI's HTTP API and over gRPC, until SIGTERM."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from memory_service.errors import FailedPrecondition, InvalidArgument
from model_worker.cli.opening import checkpoint_of, quiet
from model_worker.cli.options import (
    TARGET,
    Ca,
    Device,
    Group,
    Insecure,
    LastContext,
    MemDType,
    MemLayers,
    Model,
    ModelDType,
    Neighbours,
    Scaling,
    Target,
    Threads,
    Window,
    layers_of,
    self_extend_of,
)
from model_worker.settings import LogitScaling

NOT_AT_ALL = "none"


def api(
    model: Model,
    target: Target = TARGET,
    http: Annotated[str, typer.Option(help="host:port of OpenAI's HTTP API (port 0: any free), or none.")] = (
        "127.0.0.1:8000"
    ),
    grpc: Annotated[str, typer.Option(help="host:port of model_worker.v1 (port 0: any free), or none.")] = (
        "127.0.0.1:50051"
    ),
    keys: Annotated[
        Path | None, typer.Option(help="API keys: a file of fot token create, whose tenants are ours too.")
    ] = None,
    memory_tokens: Annotated[
        Path | None, typer.Option(help="A directory with a memory token for every tenant, in a file of its name.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="What callers call the model; by default its directory's name.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja template for chats, for models that bring none.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 4096,
    max_rows: Annotated[int, typer.Option(min=1, help="Requests answered at once; others wait.")] = 32,
    max_queued: Annotated[int, typer.Option(min=1, help="Requests that wait; one more is refused.")] = 256,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=1, help="The longest a call may take.")] = 600.0,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM certificate chain, for HTTP and gRPC.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    insecure: Insecure = False,
    drain_s: Annotated[float, typer.Option("--drain-s", min=0, help="For calls under way when it stops.")] = 30.0,
    ray: Annotated[bool, typer.Option("--ray", help="Serve on a Ray cluster, by Ray Serve.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: models that answer, at least.")] = 1,
    most_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: as many where requests queue up; by default no more.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="With --ray: the cluster; by default RAY_ADDRESS, or the one of fot up.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="With --ray: of each replica.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="With --ray: of each replica, as 0.5.")] = 0.0,
    ca: Ca = None,
    mem_layers: MemLayers = None,
    mem_dtype: MemDType = None,
    window: Window = None,
    last_context: LastContext = None,
    group: Group = None,
    neighbours: Neighbours = None,
    logit_scaling: Scaling = LogitScaling.NONE,
    dtype: ModelDType = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C, then let answers under way finish.

    With --keys every caller needs an API key, and sees the memories of the key's tenant alone.
    """
    directory = checkpoint_of(model)
    extend = self_extend_of(group, neighbours, logit_scaling)
    template = None if chat_template is None else _text(chat_template)

    # Transformers takes seconds to import; what was wrong so far should not.
    from memory_service.process.lifetime import run
    from model_worker.api.limits import Limits
    from model_worker.api.process import serve
    from model_worker.api.server import Addresses
    from model_worker.api.setup import Setup
    from model_worker.serving.settings import BatchSettings

    addresses = Addresses(
        None if http == NOT_AT_ALL else http,
        None if grpc == NOT_AT_ALL else grpc,
        tls_certificate,
        tls_key,
        insecure,
        drain_s,
    )
    addresses.check(keys is not None)
    if not ray:  # There the paths are those of the nodes.
        addresses.check_files()
    setup = Setup(
        model=directory,
        name=served_name or directory.resolve().name,
        target=target,
        keys=keys,
        memory_tokens=memory_tokens,
        ca=ca,
        insecure=insecure,
        chat_template=template,
        mem_layers=layers_of(mem_layers),
        window=window,
        last_context=last_context,
        mem_dtype=mem_dtype,
        dtype=dtype,
        device=device,
        threads=threads,
        self_extend=extend,
        limits=Limits(new_tokens=max_new_tokens, timeout_s=timeout_s),
        batch=BatchSettings(max_rows=max_rows, max_queued=max_queued),
    )
    quiet()

    def announce(http: str | None, grpc: str | None) -> None:
        letter = "" if tls_certificate is None else "s"
        places = [f"http{letter}://{http}/v1"] if http else []
        places += [f"grpc{letter}://{grpc}"] if grpc else []
        sys.stdout.write(f"fot answers as {setup.name} at {' and '.join(places)}\n")
        sys.stdout.flush()

    if ray:
        if find_spec("ray") is None:
            raise FailedPrecondition("--ray needs Ray: pip install 'fot-memory[ray]'", reason="EXTRA_MISSING")
        from model_worker.cli.serving_on_ray import serve_on_ray

        serve_on_ray(setup, addresses, replicas, most_replicas, cpus, gpus, address, announce)
        return
    if target.startswith("ray://"):
        from model_worker.deployment.connection import connect

        connect()  # Now, and in this thread: where Ray is joined it sets signal handlers of its own.
    with setup.open() as (worker, accepted):
        run(serve(worker, accepted, addresses, lambda server: announce(server.http, server.grpc)))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from None

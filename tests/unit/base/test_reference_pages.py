"""The reference pages are those of the code; every error has a code of its own and says what to do."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from types import ModuleType

import pytest

from mullion.base.errors import MullionError
from mullion.base.settings import SETTINGS, Settings

pytestmark = pytest.mark.unit
ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["errors.md", "powershell.md", "settings.md"])
def test_a_page_is_up_to_date(generator: ModuleType, page: str) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == generator.PAGES[page](), "run python tools/generate_docs.py"


def test_every_code_is_one_class_s_own(generator: ModuleType) -> None:
    classes: list[type[MullionError]] = generator.error_classes()
    assert len(classes) > 15
    of_code: dict[str, list[str]] = {}
    for kind in classes:
        of_code.setdefault(kind.code, []).append(f"{kind.__module__}.{kind.__qualname__}")
    shared = {code: names for code, names in of_code.items() if len(names) > 1}
    assert not shared, "each class sets a code of its own"
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in of_code)


def test_every_error_says_what_it_means_and_what_to_do(generator: ModuleType) -> None:
    for kind in generator.error_classes():
        assert kind.default_remedy.strip(), kind
        assert (kind.__doc__ or "").strip(), kind
        assert 400 <= kind.http_status <= 599, kind
        assert 0 < kind.exit_code < 256, kind


def test_every_setting_is_a_field_with_a_usable_default(tmp_path: pathlib.Path) -> None:
    settings = Settings.load({"MULLION_CONFIG": str(tmp_path / "nothing")})
    assert [setting.name for setting in SETTINGS] == list(Settings.__dataclass_fields__)
    for setting in SETTINGS:
        assert isinstance(getattr(settings, setting.name), setting.kind)
        assert setting.help.endswith(".")

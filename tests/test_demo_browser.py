"""The demo as a person uses it, in a headless Chromium: type, click, read, upload, download, be told what is wrong."""

import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import TEXTS

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

from demo.app import EXAMPLES, MAX_FILE_BYTES, Demo  # noqa: E402

PATIENCE = 60_000  # milliseconds: machines are slow at times


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where Gradio keeps files."""
    return tmp_path_factory.mktemp("demo") / "cache"


@pytest.fixture(scope="module")
def address(pipe: Any, cache: Path) -> Iterator[str]:
    """Serves the demo over the tiny release."""
    mask = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        _, url, _ = Demo(pipe).launch(prevent_thread_lock=True, quiet=True)
        yield url
        gradio.close_all()
    os.umask(mask)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[Any]:
    """The demo in a fresh tab, which may ask no other host for anything."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    playwright.expect.set_options(timeout=PATIENCE)
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(address)
    yield page
    page.close()
    assert hosts - {None, ""} == {"127.0.0.1"} and not errors


def upload(page: Any, file: Path) -> None:
    page.get_by_role("tab", name="File").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Click to upload").click()
    chooser.value.set_files(file)


def test_a_text_is_typed_and_its_answers_are_read(page: Any, pipe: Any) -> None:
    record = pipe(TEXTS[3])
    page.get_by_label("Up to 20,000").fill(TEXTS[3])
    page.get_by_role("button", name="Annotate", exact=True).click()
    vector = record["sentence_embedding"]
    playwright.expect(page.locator(".vector i").first).to_have_attribute("title", f"0: {vector[0]:.3f}")
    assert page.locator(".vector i").count() == len(vector)
    words = page.get_by_test_id("highlighted-text").first.locator(".highlighted .text").all_text_contents()
    assert [word.strip() for word in words] == [entity["word"] for entity in record["entities"]["ner"]]
    assert page.get_by_test_id("label-output-value").first.inner_text() == record["labels"]["sentiment"]["label"]


def test_an_example_is_annotated_by_a_click(page: Any, pipe: Any) -> None:
    vector = pipe(EXAMPLES[2])["sentence_embedding"]
    page.get_by_role("button", name=EXAMPLES[2]).click()
    playwright.expect(page.locator(".vector i").first).to_have_attribute("title", f"0: {vector[0]:.3f}")


def test_texts_are_compared(page: Any) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("One text on each line").fill("I love it!\n<img src=x onerror=alert(1)>\nso sad")
    page.get_by_role("button", name="Compare").click()
    playwright.expect(page.locator(".heat td")).to_have_count(9)
    assert page.locator(".heat td").first.inner_text() == "1.00"
    playwright.expect(page.locator(".pairs li")).to_have_count(3)
    assert page.locator(".heat tbody th").nth(1).inner_text() == "2. <img src=x onerror=alert(1)>"


def test_stored_vectors_are_moved_from_the_keyboard_alone(page: Any) -> None:
    page.get_by_role("tab", name="Text").focus()
    for _ in range(4):
        if page.evaluate("document.activeElement.textContent").strip() == "Moving your index":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    vectors = page.get_by_label("One JSON list on each line")
    vectors.fill(str([1] * 32))
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_text("1 vectors: 32 → 8 dimensions")).to_be_visible()
    assert page.locator("textarea:visible").last.input_value().count(",") == 7


def test_nothing_is_wider_than_a_phone(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 375, "height": 800})
    page.goto(address)
    for name in ("Text", "Compare", "Moving your index", "File"):
        page.get_by_role("tab", name=name).click(timeout=PATIENCE)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, name
    page.close()


def test_html_in_texts_and_entities_is_shown_as_text(page: Any, pipe: Any) -> None:
    text = (
        'Tim <img src="https://example.org/x" onerror="document.title=1"> met <b>Bob</b> & <script>document.title=1</script>'
    )
    page.get_by_label("Up to 20,000").fill(text)
    page.get_by_role("button", name="Annotate", exact=True).click()
    vector = pipe(text)["sentence_embedding"]
    playwright.expect(page.locator(".vector i").first).to_have_attribute("title", f"0: {vector[0]:.3f}")
    shown = page.get_by_test_id("highlighted-text")
    for words in shown.all():
        # Without the names of the entities, which stand between the words.
        assert "".join(words.locator(".text").all_text_contents()).replace(" ", "") == text.replace(" ", "")
    page.get_by_text("The record, as the pipeline returns it").click()
    assert shown.locator("img, b, script").count() == 0 and page.locator("img[src*='example.org']").count() == 0
    assert page.title() != "1"


def test_html_in_a_file_is_shown_as_text(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "<b>mine.csv"
    file.write_text('<i>text</i>\n"<img src=x onerror=""document.title=1""> Bob"\n')
    upload(page, file)
    playwright.expect(page.get_by_label("Column with the texts")).to_have_value("<i>text</i>")
    page.get_by_role("button", name="Annotate the file").click()
    playwright.expect(page.get_by_role("gridcell").filter(has_text="<img src=x").first).to_be_visible()
    assert page.locator("td img, th i, a b").count() == 0 and page.title() != "1"


def test_a_csv_file_is_uploaded_and_downloaded(page: Any, pipe: Any, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("number,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)))
    upload(page, file)
    playwright.expect(page.get_by_label("Column with the texts")).to_have_value("text")
    page.get_by_role("button", name="Annotate the file").click()
    with page.expect_download() as download:
        page.locator("a[download='mine_annotated.csv']").click()
    rows = list(csv.DictReader(download.value.path().read_text("utf-8").splitlines()))
    assert [row["text"] for row in rows] == TEXTS
    kept = list(cache.rglob("*"))
    names = {path.name for path in kept}
    assert "mine.csv" in names and not any("annotated" in name for name in names), "what was uploaded, and no more"
    private = [path for path in kept if path.is_dir() or path.name == "mine.csv"]
    assert not any(path.stat().st_mode & 0o077 for path in private), "no one else may read it"
    assert [row["predicted_sentiment"] for row in rows] == [x["labels"]["sentiment"]["label"] for x in pipe(TEXTS)]


def test_bad_input_is_explained(page: Any, tmp_path: Path) -> None:
    page.get_by_label("Up to 20,000").fill(" ")
    page.get_by_role("button", name="Annotate", exact=True).click()
    playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("text is empty; type or paste one.")
    page.get_by_test_id("toast-close").click()
    (tmp_path / "bad.csv").write_text("id,<b>review</b>\n1,a\n")
    upload(page, tmp_path / "bad.csv")
    page.get_by_role("button", name="Annotate the file").click()
    playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("column is empty; allowed: id, <b>review</b>.")


def test_a_large_file_is_refused(page: Any, tmp_path: Path) -> None:
    (tmp_path / "large.csv").write_bytes(b"text\n" + b"a" * MAX_FILE_BYTES)
    upload(page, tmp_path / "large.csv")
    playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("size")

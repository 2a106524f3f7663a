"""Small files and small functions, so that each fits in a head."""

from statistics import median, quantiles

from tests.architecture.tree import functions, name, sources

LONGEST_FILE = 400
MEDIAN_FUNCTION = 9
NINE_IN_TEN_FUNCTIONS = 35


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in sources("services", "shared", "cli", "bench")}
    assert {file: length for file, length in lengths.items() if length > LONGEST_FILE} == {}


def test_the_median_function_has_at_most_9_lines() -> None:
    assert median(function.num_lines for function in functions()) <= MEDIAN_FUNCTION


def test_nine_in_ten_functions_have_at_most_35_lines() -> None:
    longest = sorted(functions(), key=lambda function: -function.num_lines)[:10]
    tenth = quantiles((function.num_lines for function in functions()), n=10)[-1]
    assert tenth <= NINE_IN_TEN_FUNCTIONS, longest


def test_docs_architecture_fits_on_two_pages() -> None:
    from tests.architecture.tree import ROOT

    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 120

"""What can be done here: `nox -l` lists it, `nox -s NAME` does it, with `--no-venv` in the current environment."""

from __future__ import annotations

import os
import shutil

import nox

nox.needs_version = ">=2024.3"
nox.options.sessions = ["lint", "types", "imports", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True


def prepare(session: nox.Session) -> None:
    """Installs the checkout and all that the tests need, unless the current environment is to be used as it is."""
    if session.virtualenv.venv_backend != "none":
        session.install("-e", ".[all,test]")


def installed(session: nox.Session) -> str:
    """A folder with what a wheel would install: in the checkout the packages stand elsewhere."""
    prepare(session)
    folder = session.create_tmp()
    shutil.rmtree("build", ignore_errors=True)  # setuptools would add what an earlier build left there
    session.run("python", "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder, ".")
    return folder


@nox.session
def tests(session: nox.Session) -> None:
    """The default tests."""
    prepare(session)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take minutes."""
    prepare(session)
    session.run("python", "-m", "pytest", "-m", "slow", *session.posargs)


@nox.session
def distributed(session: nox.Session) -> None:
    """Tests that start several processes."""
    prepare(session)
    session.run("python", "-m", "pytest", "-n", "0", "-m", "distributed", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests that need a CUDA or ROCm device."""
    prepare(session)
    session.run("python", "-m", "pytest", "-n", "0", "-m", "gpu", *session.posargs)


@nox.session
def sweep(session: nox.Session) -> None:
    """Every model class that can be built; hours. `-- --match 'Bert*'` for a few."""
    prepare(session)
    session.run("python", "tests/sweep", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, which changes nothing here; `ruff check --fix . && ruff format .` does."""
    prepare(session)
    session.run("python", "-m", "ruff", "check", ".")
    session.run("python", "-m", "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, on what a wheel would install."""
    config = os.path.abspath("pyproject.toml")
    with session.chdir(installed(session)):
        session.run("python", "-m", "mypy", "--config-file", config, "invact")


@nox.session
def imports(session: nox.Session) -> None:
    """Whether imports run downwards, in what a wheel would install; pyproject.toml says what is above what."""
    folder = installed(session)
    shutil.copy("pyproject.toml", folder)
    with session.chdir(folder):
        session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "."})


@nox.session
def docs(session: nox.Session) -> None:
    """The site, into docs/_build/html; warnings are errors."""
    prepare(session)
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def accuracy(session: nox.Session) -> None:
    """The accuracy of every curve, measured; writes the tables and the plot of the docs."""
    prepare(session)
    session.run("python", "docs/accuracy.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Kernels and whole steps against stock, measured."""
    prepare(session)
    session.run("python", "-m", "invact", "bench", *session.posargs)


@nox.session
def coefficients(session: nox.Session) -> None:
    """The coefficients of the two-sided curves, worked out again; `-- --check` compares only."""
    prepare(session)
    session.run("python", "-m", "invact.kernels.polynomials.generate", *session.posargs)

# Sourced by every script: finds this repository ($ROOT) and its Python ($PYTHON). The working folder stays the user's.
ROOT="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# An environment that is active comes first, then this repository's own; conda's base is not one that anybody chose.
if [ -n "${PYTHON:-}" ]; then case "$PYTHON" in /*) ;; */*) PYTHON="$PWD/$PYTHON" ;; esac
elif [ -x "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" ]; then PYTHON="$VIRTUAL_ENV/bin/python"
elif [ -x "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then PYTHON="$CONDA_PREFIX/bin/python"
elif [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"
elif [ -x "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" ]; then PYTHON="$CONDA_PREFIX/bin/python"
else PYTHON=python3
fi
export PYTHON
if [ -z "${NPP_PYTHON_SAID:-}" ]; then
    export NPP_PYTHON_SAID=1
    echo "using $(command -v "$PYTHON" || echo "$PYTHON")" >&2
fi

# Idle OpenMP threads go to sleep after so many rounds. By default they spin so long that on two cores one busy
# program slows everything down several times; fewer rounds soften that, far fewer would cost time on idle cores.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"

# install [EXTRA_REQUIREMENT...]: make the active environment, or ./.venv, complete. Does nothing when it is.
install() {
    if [ "$PYTHON" = python3 ] || { [ "${CONDA_DEFAULT_ENV:-}" = base ] && [ "$PYTHON" = "${CONDA_PREFIX:-}/bin/python" ]; }; then
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: Python 3.10 or newer is needed, $PYTHON is $("$PYTHON" --version 2>&1)" >&2; exit 2; }
        "$PYTHON" -m venv "$ROOT/.venv" || {
            rm -rf "$ROOT/.venv"
            echo "error: $PYTHON cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }
        PYTHON="$ROOT/.venv/bin/python"
        echo "made $ROOT/.venv, using it" >&2
    fi
    local stamp wanted
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.next-patch-prediction"
    wanted="$(cksum < "$ROOT/requirements.txt") $*"
    if ! grep -qsxF "$wanted" "$stamp"; then
        echo "installing requirements (PyTorch is a download of some gigabytes)" >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt" "$@"
        echo "$wanted" >> "$stamp"
    fi
}

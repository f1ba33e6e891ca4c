# Sourced by every script: goes to the repository's root and finds its Python.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${PYTHON:-}" ]; then :
elif [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then PYTHON=python
elif [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python
else PYTHON=python3
fi

# Idle OpenMP threads go to sleep after so many rounds. By default they spin so long that on two cores one busy
# program slows everything down several times; fewer rounds soften that, far fewer would cost time on idle cores.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"

# Make the environment of the active virtual environment, or of ./.venv, complete. Does nothing when it is.
install() {
    if [ "$PYTHON" = python3 ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: Python 3.10 or newer is needed, python3 is $(python3 --version 2>&1)" >&2; exit 2; }
        python3 -m venv .venv || {
            rm -rf .venv
            echo "error: python3 cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }
        PYTHON=.venv/bin/python
    fi
    local stamp wanted
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.next-patch-prediction"
    wanted="$(cat pyproject.toml requirements.txt | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing requirements (PyTorch is a download of some gigabytes)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".[dev]"
        echo "$wanted" > "$stamp"
    fi
}

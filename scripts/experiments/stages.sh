# Sourced by the experiments, which run stages in $RUN one after the other, and continue where they stopped.
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
RUN="$(realpath -m "${RUN:-$ROOT/runs/$(basename "$0" .sh)${EXPERIMENT_SMOKE:+-smoke}}")"
cd "$ROOT"
mkdir -p "$RUN/done"

# A request to end goes to the stage, which saves; then this script ends too. (Stages in the background ignore Ctrl-C.)
child=
end() {
    trap - TERM HUP INT
    if [ -n "$child" ]; then kill -TERM "$child" 2> /dev/null || true; wait "$child" || true; fi
    echo "stopped; the same command continues" >&2
    exit "$1"
}
trap 'end 143' TERM
trap 'end 129' HUP
trap 'end 130' INT
[ -z "${SLURM_JOB_ID:-}" ] || trap 'end 138' USR1

# stage NAME COMMAND...: run a command unless it and all before it have succeeded as they are now. Its mark holds the seconds
# it took and a checksum of all commands up to it.
chain=
stage() {
    local name="$1" start="$SECONDS" known log; shift
    chain="$(printf '%s\n' "$chain" "$@" | cksum)"
    known="$(cat "$RUN/done/$name" 2> /dev/null || true)"
    if [[ "$known" =~ ^[0-9]+$'\n'"$chain"$ ]]; then echo "== $name: done before"; return; fi
    echo "== $name: $*"
    touch "$RUN/done/.started"
    "$@" &
    child=$!
    wait "$child"
    child=
    # A training that is asked to end saves, and ends with status 0.
    while IFS= read -r log; do
        if grep -qs '"finished": false' "${log%/*}/run.json"; then
            echo "$name was stopped before its end; the same command continues" >&2
            exit 143
        fi
    done < <(find "$RUN" -name log.txt -newer "$RUN/done/.started" 2> /dev/null)
    printf '%s\n' "$((SECONDS - start))" "$chain" > "$RUN/done/.$name.part"
    mv "$RUN/done/.$name.part" "$RUN/done/$name"
}

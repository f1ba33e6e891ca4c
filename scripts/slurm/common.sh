# Sourced by the .sbatch files: one task a machine starts that machine's processes; a job that was stopped is requeued.
: "${SLURM_JOB_ID:?submit this by sbatch}"
ROOT="${NPP_ROOT:-$SLURM_SUBMIT_DIR}"
export NNODES="$SLURM_JOB_NUM_NODES"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # jobs that share a machine do not meet
export MASTER_ADDR MASTER_PORT

# Slurm warns this shell alone (--signal=B:USR1@120); srun hands it to its tasks, which save.
child= stopped=0
stop() { stopped=$((stopped + 1)); kill -USR1 "$child" 2> /dev/null || true; }
trap stop USR1 TERM

# stage SCRIPT FLAGS...: run a script on every machine, to its end or until a warning comes. Then unfinished tells whether
# the job is put into the queue again, where the same command resumes. Status 2 is a user's mistake: not again.
stage() {
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
        bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$@"' - "$ROOT/$1" "${@:2}" &
    child=$!
    while :; do # a signal ends `wait`, not the stage
        local before="$stopped"
        status=0
        wait "$child" || status=$?
        [ "$stopped" != "$before" ] || break
    done
    if [ "$stopped" != 0 ] && [ "$status" != 2 ] && unfinished; then
        echo "stopped with status $status: job $SLURM_JOB_ID is requeued" >&2
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$status"
}

# Most stages end with status 0 only when they have finished.
unfinished() { [ "$status" != 0 ]; }

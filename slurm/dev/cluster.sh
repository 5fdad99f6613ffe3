#!/usr/bin/env bash
# A real SLURM cluster on this one machine, for developers and CI: munged, slurmctld, slurmdbd with MariaDB,
# and two slurmd.
#
#   slurm/dev/cluster.sh up        start what is not running, then: . $FLEARN_SLURM_DIR/env.sh
#   slurm/dev/cluster.sh down      stop it; its state and logs stay
#   slurm/dev/cluster.sh purge     stop it and delete its folder
#
# Debian/Ubuntu packages: slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core
# Everything lies in one folder. One system-wide file changes: /etc/hosts gets the nodes' names.
#
#   FLEARN_SLURM_DIR    state, logs, configuration      (/tmp/flearn-slurm-$UID)
#   FLEARN_SLURM_NODES  virtual nodes                   (2)
#   FLEARN_SLURM_CPUS   CPUs that each node claims      (4)
#   FLEARN_SLURM_MEM    MiB that each node claims       (12000)
#   FLEARN_SLURM_GPUS   fake GPUs that each node claims (2)
#   FLEARN_SLURM_PORT   first of the TCP ports it takes (17817)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DIR=${FLEARN_SLURM_DIR:-/tmp/flearn-slurm-$UID}
NODES=${FLEARN_SLURM_NODES:-2}
CPUS=${FLEARN_SLURM_CPUS:-4}
MEM=${FLEARN_SLURM_MEM:-12000}
GPUS=${FLEARN_SLURM_GPUS:-2}
PORT=${FLEARN_SLURM_PORT:-17817}
USER=$(id -un)
HOST=$(hostname -s)
DBD_PORT=$((PORT + 1))
SQL_PORT=$((PORT + 2))
FIRST_NODE_PORT=$((PORT + 3))
LAST_NODE_PORT=$((PORT + 2 + NODES))
MEM_PER_CPU=$((MEM / CPUS))
export HOST DBD_PORT FIRST_NODE_PORT LAST_NODE_PORT MEM_PER_CPU
PATH=$PATH:/usr/sbin:/sbin

die() {
    echo "cluster.sh: $*" >&2
    tail -n 10 "$DIR"/log/*.log >&2 2>/dev/null || true
    exit 1
}

wait_for() { # NAME COMMAND...: until it succeeds, 30 s at most
    local name=$1 deadline=$((SECONDS + 30))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || die "$name did not come up in 30 s"
        sleep 0.1
    done
}

is_alive() { # PIDFILE COMMAND: the process is there, and no zombie, nor another process with its number
    [[ $(cat "/proc/$(cat "$1" 2>/dev/null)/stat" 2>/dev/null) == *"($2"*") "[!ZX]" "* ]]
}

need() {
    local program
    for program in munged slurmctld slurmd slurmdbd sbatch mariadbd mariadb-install-db; do
        command -v "$program" >/dev/null || die "$program not found: apt-get install --no-install-recommends \
slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core"
    done
}

fill() { # TEMPLATE: to standard output, with @NAME@ replaced by the variable of that name
    local text name
    text=$(<"$1")
    for name in DIR NODES CPUS MEM GPUS PORT USER HOST DBD_PORT SQL_PORT FIRST_NODE_PORT LAST_NODE_PORT \
        MEM_PER_CPU; do
        text=${text//@$name@/${!name}}
    done
    printf '%s\n' "$text"
}

write_env() {
    cat >"$DIR/env.sh" <<EOF
export FLEARN_SLURM_DIR=$DIR SLURM_CONF=$DIR/etc/slurm.conf
EOF
    export SLURM_CONF=$DIR/etc/slurm.conf
}

# Job ids start from the clock whenever the state is new: ids used twice would find the results of other jobs.
write_config() {
    local first
    fill "$here/slurm.conf.in" >"$DIR/etc/slurm.conf.wanted"
    if ! cmp -s "$DIR/etc/slurm.conf.wanted" "$DIR/etc/slurm.conf.base"; then
        [ ! -f "$DIR/etc/slurm.conf" ] || { stop && rm -rf "$DIR"/state/* "$DIR"/spool/*; }
        first=$(($(date +%s) % 60000000 + 1000))
        cat "$DIR/etc/slurm.conf.wanted" - >"$DIR/etc/slurm.conf" <<<"FirstJobId=$first"
        mv "$DIR/etc/slurm.conf.wanted" "$DIR/etc/slurm.conf.base"
    fi
    echo "CgroupAutomount=no" >"$DIR/etc/cgroup.conf"
    fill "$here/slurmdbd.conf.in" >"$DIR/etc/slurmdbd.conf"
    chmod 600 "$DIR/etc/slurmdbd.conf"
}

# slurmd wants character devices whose names end in the GPU's number; it never opens them.
make_gpus() {
    local i devices=$DIR/gpu/fake
    for ((i = 0; i < GPUS; i++)); do
        [ -c "$devices$i" ] || mknod -m 666 "$devices$i" c 1 3 2>/dev/null || devices=/dev/tty
    done
    printf 'AutoDetect=off\nNodeName=n[1-%s] Name=gpu File=%s[0-%s]\n' "$NODES" "$devices" "$((GPUS - 1))" \
        >"$DIR/etc/gres.conf"
}

name_nodes() {
    local i missing=
    for ((i = 1; i <= NODES; i++)); do getent hosts "n$i" >/dev/null || missing+=" n$i"; done
    [ -z "$missing" ] || echo "127.0.0.1$missing # flearn dev cluster" >>/etc/hosts ||
        die "cannot add$missing to /etc/hosts"
}

start_munge() {
    ! is_alive "$DIR/run/munged.pid" munged || return 0
    [ -f "$DIR/etc/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$DIR/etc/munge.key")
    # --force: munged otherwise refuses folders below /tmp, and running as root.
    munged --force --key-file="$DIR/etc/munge.key" --socket="$DIR/run/munge.sock" \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/etc/munge.seed" \
        9>&- 2>>"$DIR/log/munged.err" || die "munged failed"
    wait_for munged munge -n -S "$DIR/run/munge.sock"
}

sql() { mariadb --no-defaults --socket="$DIR/run/mysql.sock" --user="$USER" "$@"; }

start_database() {
    if ! is_alive "$DIR/run/mysqld.pid" mariadbd; then
        [ -d "$DIR/mysql/mysql" ] || mariadb-install-db --no-defaults --user="$USER" --datadir="$DIR/mysql" \
            --skip-test-db --auth-root-authentication-method=socket --auth-root-socket-user="$USER" \
            >"$DIR/log/mysql-install.log" 2>&1 || die "mariadb-install-db failed"
        setsid mariadbd --no-defaults --user="$USER" --datadir="$DIR/mysql" --socket="$DIR/run/mysql.sock" \
            --pid-file="$DIR/run/mysqld.pid" --bind-address=127.0.0.1 --port="$SQL_PORT" \
            --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF \
            --skip-name-resolve \
            >"$DIR/log/mysqld.log" 2>&1 </dev/null 9>&- &
        disown
        wait_for MariaDB sql --execute 'select 1'
        sql --execute "create database if not exists slurm_acct_db;
            create user if not exists 'slurm'@'127.0.0.1' identified by 'flearndev';
            grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1';"
    fi
    if ! is_alive "$DIR/run/slurmdbd.pid" slurmdbd; then
        slurmdbd 9>&- >>"$DIR/log/slurmdbd.out" 2>&1 || die "slurmdbd failed"
        wait_for slurmdbd sacctmgr --noheader list cluster
    fi
    sacctmgr --noheader list cluster format=cluster%20 | grep -q flearndev ||
        sacctmgr --immediate add cluster flearndev >/dev/null || die "sacctmgr add cluster failed"
    sacctmgr --noheader list associations format=user%50 | grep -qw "$USER" || {
        sacctmgr --immediate add account dev description=dev organization=dev
        sacctmgr --immediate add user "$USER" account=dev
    } >/dev/null || die "sacctmgr add user failed"
}

start_slurm() {
    local i
    is_alive "$DIR/run/slurmctld.pid" slurmctld || slurmctld -i 9>&- >>"$DIR/log/slurmctld.out" 2>&1 ||
        die "slurmctld failed"
    wait_for slurmctld sh -c 'scontrol ping | grep -q "is UP"'
    for ((i = 1; i <= NODES; i++)); do
        mkdir -p "$DIR/spool/n$i"
        is_alive "$DIR/run/slurmd-n$i.pid" slurmd || slurmd -N "n$i" 9>&- >>"$DIR/log/slurmd-n$i.out" 2>&1 ||
            die "slurmd n$i failed"
    done
    # Nodes that an earlier test left down or drained come back.
    sinfo --noheader --Node --states=down,drain,fail --format=%N | sort -u | while read -r node; do
        scontrol update "nodename=$node" state=resume || true
    done
    wait_for "$NODES nodes" nodes_are_up
}

nodes_are_up() {
    local up # a node is listed once for each of its partitions
    up=$(sinfo --noheader --Node --format='%N %t' | awk '$2 ~ /^(idle|mix|alloc|comp)$/ {print $1}' | sort -u)
    [ "$(wc -w <<<"$up")" -ge "$NODES" ]
}

start() {
    need
    mkdir -p "$DIR"/{etc,gpu,log,run,spool,state}
    chmod 755 "$DIR" "$DIR"/{etc,run}
    exec 9>"$DIR/lock"
    flock --timeout 120 9 || die "another cluster.sh is at work in $DIR"
    write_env
    write_config
    make_gpus
    name_nodes
    start_munge
    start_database
    start_slurm
    echo "$(sinfo --noheader --format='%P %D nodes %t' | tr '\n' ';') now: . $DIR/env.sh"
}

end() { # PIDFILE COMMAND: SIGTERM, and SIGKILL after 10 s
    local pid i
    is_alive "$1" "$2" || { rm -f "$1"; return 0; }
    pid=$(cat "$1" 2>/dev/null) || return 0 # it has just ended by itself
    kill "$pid" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do
        is_alive "$1" "$2" || break
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$1"
}

stop() {
    [ -d "$DIR" ] || return 0
    local pidfile
    export SLURM_CONF=$DIR/etc/slurm.conf
    if is_alive "$DIR/run/slurmctld.pid" slurmctld; then
        timeout 10 scancel --user="$USER" 2>/dev/null || true
        for _ in {1..50}; do
            [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    for pidfile in "$DIR"/run/slurmd-*.pid; do end "$pidfile" slurmd; done
    end "$DIR/run/slurmctld.pid" slurmctld
    end "$DIR/run/slurmdbd.pid" slurmdbd
    end "$DIR/run/mysqld.pid" mariadbd
    end "$DIR/run/munged.pid" munged
}

case ${1:-} in
    up) start ;;
    down) stop ;;
    purge) stop && rm -rf "$DIR" ;;
    *) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
esac

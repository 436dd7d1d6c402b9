#!/usr/bin/env bash
# PID 1 of the namespaces that tests/test_systemd.py makes: hides every folder that a booting systemd would write to, installs
# the node as docs/install.md does, and becomes systemd.
#
#   boot.sh CHECKOUT PYTHON_PREFIX SITE_PACKAGES CONFIG
#
# The root file system is the machine's own. A boot empties /tmp and fills /var/lib: nothing may run before the mounts below.
set -euo pipefail
checkout=$1 python_prefix=$2 site_packages=$3 config=$4

mount --make-rprivate /
stage=$(mktemp -d)
mount -t tmpfs none "$stage"
# What is to be seen later may lie under a folder that is hidden next: it is held by a mount of its own meanwhile.
mkdir "$stage"/{src,python,site-packages,etc}
mount --rbind "$checkout" "$stage/src"
mount --rbind "$python_prefix" "$stage/python"
mount --rbind "$site_packages" "$stage/site-packages"
cp -a /etc/. "$stage/etc/"
cp "$config" "$stage/config.yaml"

mount -t tmpfs -o mode=755 none /opt
mkdir -p /opt/radnode/{bin,src,site-packages} /opt/python
mount --rbind "$stage/src" /opt/radnode/src
mount --rbind "$stage/site-packages" /opt/radnode/site-packages
mount --rbind "$stage/python" /opt/python
mount -t tmpfs -o mode=755 none /etc
cp -a "$stage/etc/." /etc/
cp "$stage/config.yaml" /opt/radnode/config.yaml
umount -l "$stage"
rmdir "$stage" # on the machine's own disk

for folder in /run /tmp /var/tmp /var/lib /var/cache /var/log; do
    mount -t tmpfs none "$folder"
done
chmod 1777 /tmp /var/tmp
chmod 755 /run /var/lib /var/cache /var/log
# journald puts a link in /dev, and PID 1 raises limits in /proc/sys.
mkdir -p /run/lock/dev
for node in null zero full random urandom tty; do
    touch "/run/lock/dev/$node"
    mount --bind "/dev/$node" "/run/lock/dev/$node"
done
mkdir /run/lock/dev/{shm,pts}
ln -s /proc/self/fd /run/lock/dev/fd
ln -s pts/ptmx /run/lock/dev/ptmx
mount -t devpts -o newinstance,ptmxmode=0666 none /run/lock/dev/pts
mount -t tmpfs -o mode=1777 none /run/lock/dev/shm
mount --rbind /run/lock/dev /dev
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
umount -R /sys/fs/cgroup 2>/dev/null || umount -lR /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup

mkdir -p /run/systemd/system
for unit in systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service systemd-tmpfiles-clean.timer systemd-udevd.service \
    systemd-udev-trigger.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-sysusers.service \
    systemd-update-utmp.service systemd-remount-fs.service systemd-modules-load.service systemd-sysctl.service \
    systemd-random-seed.service systemd-pstore.service systemd-network-generator.service getty.target kmod-static-nodes.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount \
    proc-sys-fs-binfmt_misc.automount; do
    ln -s /dev/null "/run/systemd/system/$unit"
done

# From here on as in docs/install.md; the wrapper stands for the command of the virtual environment.
# Behind the standard library, where a virtual environment has them: one of the packages is called argparse.
mkdir /opt/radnode/site
echo 'import site; site.addsitedir("/opt/radnode/site-packages")' >/opt/radnode/site/sitecustomize.py
cat >/opt/radnode/bin/radnode <<'WRAPPER'
#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONHOME=/opt/python PYTHONPATH=/opt/radnode/src:/opt/radnode/site
exec /opt/python/bin/python3 -m node.cli "$@"
WRAPPER
chmod 755 /opt/radnode/bin/radnode
install -D -m 644 /opt/radnode/src/systemd/radnode.sysusers.conf /etc/sysusers.d/radnode.conf
systemd-sysusers /etc/sysusers.d/radnode.conf
install -d -m 750 -o root -g radnode /etc/radnode
install -m 640 -o root -g radnode /opt/radnode/config.yaml /etc/radnode/config.yaml
install -m 644 /opt/radnode/src/systemd/radnode.service /etc/systemd/system/radnode.service

export container=lxc
exec /lib/systemd/systemd --system --unit=basic.target

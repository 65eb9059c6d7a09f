#!/bin/bash
#
# devstack's plugin of nova-snapshot-ext: nova-compute with our driver.
#
# devstack sources it, as plugin.sh MODE [PHASE].
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

# Save trace setting
_XTRACE_NOVA_SNAPSHOT_EXT=$(set +o | grep xtrace)
set +o xtrace

NOVA_SNAPSHOT_EXT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Install the package, editable, into the environment that Nova is in.
function install_nova_snapshot_ext {
    setup_develop "$NOVA_SNAPSHOT_EXT_DIR"
}

# Set one of our options, if it is to be other than its default.
function _iniset_nova_snapshot_ext {
    local option=$1
    local value=$2

    if [[ -n "$value" ]]; then
        iniset "$NOVA_CONF" snapshot_ext "$option" "$value"
    fi
}

# Have nova-compute load the driver.
#
# start_nova_compute makes nova-cpu.conf of nova.conf afterwards, so this is
# where settings of nova-compute belong. They mean nothing to Nova's other
# services.
function configure_nova_snapshot_ext {
    iniset "$NOVA_CONF" DEFAULT config_source snapshot_ext
    iniset "$NOVA_CONF" snapshot_ext driver snapshot_ext
    # devstack has named Nova's own driver, and a file wins over a source.
    iniset "$NOVA_CONF" DEFAULT compute_driver \
        snapshot_ext.SnapshotLibvirtDriver
    _iniset_nova_snapshot_ext mover_python "$NOVA_SNAPSHOT_EXT_MOVER_PYTHON"
    _iniset_nova_snapshot_ext state_directory "$NOVA_SNAPSHOT_EXT_STATE_DIR"
    _iniset_nova_snapshot_ext flows "$NOVA_SNAPSHOT_EXT_FLOWS"
    _iniset_nova_snapshot_ext transfers "$NOVA_SNAPSHOT_EXT_TRANSFERS"
}

# See that nova-compute has loaded the driver, or die.
function check_nova_snapshot_ext {
    local said='Snapshots are taken by nova_snapshot_ext'
    local checked=0

    # All is read: journalctl would fail, and with pipefail this, if grep ended
    # at the first line that matches.
    if ! sudo journalctl --boot --output cat \
            --unit "devstack@n-cpu.service" | grep "$said" > /dev/null; then
        die $LINENO "nova-compute has not loaded the driver of" \
            "nova-snapshot-ext: its log does not say '$said'"
    fi
    # 1 means that something deserves attention, and is printed.
    nova-snapshot-ext-status --config-file "$NOVA_CPU_CONF" \
        upgrade check || checked=$?
    if [[ $checked -gt 1 ]]; then
        die $LINENO "nova-snapshot-ext can not serve; see the table above"
    fi
}

# Forget what a nova-compute that is gone has left.
function cleanup_nova_snapshot_ext {
    if [[ -r "$NOVA_CONF" ]]; then
        inidelete "$NOVA_CONF" DEFAULT config_source
        inidelete "$NOVA_CONF" snapshot_ext driver
        iniset "$NOVA_CONF" DEFAULT compute_driver libvirt.LibvirtDriver
    fi
    sudo rm -rf "$NOVA_SNAPSHOT_EXT_STATE_DIR"
    pip_uninstall nova-snapshot-ext
}

if is_service_enabled n-cpu; then
    case "$1:$2" in
        stack:install)
            echo_summary "Installing nova-snapshot-ext"
            install_nova_snapshot_ext
            ;;
        stack:post-config)
            if [[ "$VIRT_DRIVER" != libvirt ]]; then
                die $LINENO "nova-snapshot-ext needs VIRT_DRIVER=libvirt," \
                    "not $VIRT_DRIVER"
            fi
            echo_summary "Configuring nova-snapshot-ext"
            configure_nova_snapshot_ext
            ;;
        stack:test-config)
            echo_summary "Checking nova-snapshot-ext"
            check_nova_snapshot_ext
            ;;
        unstack:*)
            # A snapshot in flight is undone by its guard, which outlives
            # nova-compute: there is no service of ours to stop.
            ;;
        clean:*)
            echo_summary "Cleaning up nova-snapshot-ext"
            cleanup_nova_snapshot_ext
            ;;
    esac
fi

# Restore xtrace
$_XTRACE_NOVA_SNAPSHOT_EXT

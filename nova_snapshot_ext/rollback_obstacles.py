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

"""Why a guest can't go back to a snapshot of either kind."""

from xml.etree import ElementTree

from nova_snapshot_ext import domain_records
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import guest as guests

# Where a guest is on the host: others may have what it had then.
_PLACEMENT = {
    'the CPUs of the host that it is given (cputune)': './cputune',
    'its NUMA nodes of the host (numatune)': './numatune',
    'its pages of memory (memoryBacking)': './memoryBacking',
    'its own NUMA nodes (cpu)': './cpu/numa',
}


def why_not_now(guest: guests.Guest, held: base.Disks) -> str | None:
    """Why a guest can't be taken down now, None if it can.

    :param held: the disks that go back
    """
    state = guest.state()
    if state is guests.State.OTHER:
        return f'the guest is {state.value}'
    if not guest.is_persistent():
        return 'the guest is transient: turned off, it would be gone'
    if guest.has_managed_save():
        return 'its memory is saved (suspended), and would be lost'
    if state is guests.State.SHUTOFF:
        return None
    return base.why_no_job_can_start(guest, held)


def why_other_machine(guest: guests.Guest,
                      record: domain_records.Record) -> str | None:
    """Why the memory of then does not fit a guest, None if it does."""
    # libvirt's own words, kept by us.
    then = ElementTree.fromstring(  # nosec B314
        record.domain_xml).find('./domain')
    if then is None:
        return 'what is kept of it does not say what the domain was'
    now = guest.description()
    for what, path in (('memory', './memory'), ('CPUs', './vcpu')):
        if then.findtext(path) != now.findtext(path):
            return (f'its {what} were {then.findtext(path)} then and are '
                    f'{now.findtext(path)} now')
    for what, path in _PLACEMENT.items():
        if _canonical(then, path) != _canonical(now, path):
            return f'{what} were others then, which it would be given again'
    if _interfaces(then) != _interfaces(now):
        return 'it has other network interfaces than it had then'
    if record.host_cpu and record.host_cpu != guest.host_cpu():
        return 'the host has another CPU than the one that it was given then'
    return guest.why_host_can_not_run(then)


def _canonical(domain: ElementTree.Element, path: str) -> str:
    found = domain.find(path)
    return '' if found is None else ElementTree.canonicalize(
        ElementTree.tostring(found, encoding='unicode'), strip_text=True)


def _interfaces(domain: ElementTree.Element) -> set[str]:
    return {mac.get('address', '') for mac in
            domain.findall('./devices/interface/mac')}

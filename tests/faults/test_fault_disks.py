"""Disks without room: for the store, or for the run folder."""

import subprocess

import pytest
from drills import PATIENCE, Drill, heal


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 48 MiB for `drill/store` or `drill/runs`."""
    mounted = []

    def mount(name):
        place = tmp_path / "drill" / name
        place.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk is for root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place):
    """Leave no room on a disk."""
    with (place / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            return


@pytest.mark.parametrize("what", ["store", "runs"])
def test_a_disk_that_is_full_when_a_run_starts(small_disk, tmp_path, nodes, undisturbed, what):
    place = small_disk(what)
    drill = Drill(tmp_path / "drill", nodes.temporary, nodes.address)
    drill.copy_from(undisturbed, "build", "encode", "adapt", "map")
    nodes.have(1)
    fill(place)
    drill.finish(status=2)
    printed = drill.printed(drill.drivers[0])
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    (place / "ballast").unlink()
    drill.finish()
    drill.holds(undisturbed)


@pytest.mark.parametrize("what", ["store", "runs"])
def test_a_disk_that_fills_up(small_disk, tmp_path, nodes, undisturbed, what):
    place = small_disk(what)
    drill = Drill(tmp_path / "drill", nodes.temporary, nodes.address)
    drill.copy_from(undisturbed, "build", "encode", "adapt", "map")
    nodes.have(1)
    drill.plan_faults({heal(1): {"do": "stall", "step": 5}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    fill(place)
    drill.release()
    driver.wait(timeout=PATIENCE)
    printed = drill.printed(driver)
    assert driver.returncode in (1, 2), printed
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    (place / "ballast").unlink()
    drill.finish()
    drill.holds(undisturbed)

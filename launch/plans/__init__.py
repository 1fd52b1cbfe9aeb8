"""The engine of `launch.plan`: the train step compiled ahead of time for devices that are not here."""

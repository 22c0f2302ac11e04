"""Read the results of a run as typed records, for the report, the viewer and the exports."""

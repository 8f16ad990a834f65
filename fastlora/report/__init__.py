"""What runs did, on one page: ``fastlora report``. Reads the files of runs; trains and loads nothing."""

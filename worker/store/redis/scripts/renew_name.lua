-- Renews the record of the service that holds a consumer's name.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] token   ARGV[5] lease in ms   ARGV[6] about the caller
-- Returns 1.
write_record(ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
return 1

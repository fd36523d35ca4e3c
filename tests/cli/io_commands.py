"""Command lines that ``qemu-io`` and this project's program are both given (see ``test_differential_io``).

A line of ``ON_IMAGES`` is what is done to a freshly made image: commands parted by ``@``, before which ``%`` and
options of the program may stand. A line of ``WHOLE`` is a program's whole command line, in the words of a shell.

``python -m tests.cli.io_commands`` tells how many there are.
"""

from __future__ import annotations

ON_RAW = """
read
read 0
read 0 1 2
read x 1
read 0 x
read -1 1
read -- -1 1
read 0 -1
read -P 0 4k
read -P 0 0 4k
read -P 0x1ff 0 4k
read -P 1 0 4k
read -P 0x41 0 4k
read -P 1 -s 100 0 4k
read -P 1 -l 100 0 4k
read -P 1 -l 5000 0 4k
read -P 0 -s 5000 0 4k
read -s 5 0 4k
read -l 5 0 4k
read -z 0 4k
read -C 0 4k
read -q 0 4k
read -v 0 40
read -v 0 47
read -v 0 300
read -v 1 16
read -v 5 33
read -v 0x1000 64
read -v 0 0
read 2M 4k
read 1020k 8k
read 1M 0
read 0 0
read 0 3G
read 0 2147483647
read 0 2147483136
read 0 1.5k
read 0 1.5
read 0 9999999999999999999
read 0 9223372036854775807
read 0 9223372036854775808
read 8E 1
read 7E 1
read -b 0 4k
read -b 1 4k
read -p 1 4k
read -a 0 4k
read -P 5 -s x 0 4k
read -P 5 -l x 0 4k
read -P 5 -s -1 0 4k
read -P
read -Pfoo 0 4k
read -P -5 0 4k
read -P 0 -l 0 0 4k
read -P 0 -s 4k 0 4k
read -P 0 -s 4k -l 1 0 4k
read -P 7 -s 1k -l 1k 8k 4k
read -P 0x41 -s 1k -l 1k 0 4k
read -qP 7 -s 1k -l 1k 8k 4k
read -CP 7 8k 4k
read -vP 7 8k 16
read -qv 0 16
read -Cv 0 16
read -CC 0 16
read 0 4k -q
read 0 -q 4k
read 0 -- 4k
read -- 0 4k
read - 0
read --foo 0 1
READ 0 4k
 read 0 4k
read  0   4k
read '0 4k'
read "0" 4k
read -P 5 -P 0x41 0 1
read -P 1 -P x -P 2 0 1
read -P '' 0 1
read -P 0x 0 1
read -P 1.0 0 1
read -P +65 0 1
read -P 256 0 1
read -P 255 0 1
read -P 08 0 1
read -P 0101 0 1
read -P 99999999999999999999 0 1
read -P 0b1 0 1
read -P \\x 0 1
read -P 0 -l 4k -s 0 0 4k
read -l 1k -P 0 -s 512 0 2k
read -P 0 -s 9999999999999 0 4k
read -P 0 -l 3G 0 4k
read -P 0 -s 3G 0 4k
read -P 0 -l 9999999999999999999 0 4k
read -P 5 -l 9 x 4k
read -P 5 -l 9999999 -b 1 4k
read -b -P 0 0 513
read -b 0 0
read -l
read -s
r 0 4k
r
r 0 1 2
readv
readv 0
readv 0 4k
readv 0 4k 4k
readv 0 1k 2k 3k@readv -v 0 8 8 3
readv -v 3 5 5 5 5
readv 0 513 511
readv 0 x
readv 0 1 x
readv x 1
readv -P 5 0 4k 4k
readv -P 0x41 0 4k 4k
readv -P 5 -q 0 4k 4k
readv -P 5 -v 0 5
readv -P 500 0 4k 4k
readv -z 0 4k
readv -C 0 4k 4k
readv -s 3 -P 5 0 4k
readv 0 2G
readv 0 1G 1G
readv 0 2147483136 1
readv 0 0 0
readv 0 0 512 0 512
readv 2M 4k
readv 1020k 4k 4k
readv 0 -1
readv -q 0
write
write 0
write 0 1 2
write -z
write -P 5 -z 0 4k
write -P 300 0 4k
write -P x 0 4k
write -P 5x 0 4k
write -P 5 0 4k@read -P 5 0 4k@read -v 0 16
write 0 64k@read -P 0xcd 0 64k@read -P 0x41 64k 64k
write -P 0xff 0 4k
write -P 010 0 4k@read -P 8 0 4k
write -u 0 4k
write -n 0 4k
write -z -n 0 4k@read -P 0 0 4k
write -zu 0 4k@read -P 0 0 4k
write -zun 0 4k
write -zf 0 4k
write -zzz 0 4k
write -ff 0 4k
write -f 0 4k
write -c 0 4k
write -c 0 512
write -c 0 513
write -c 0 0
write -c -z 0 4k
write -c -f 0 4k
write -c -b 0 4k
write -c -P 4 -f 0 4k
write -bz 0 4k
write -b 0 4k
write -b 0 0
write -bf 0 4k
write -bc 0 4k
write -b 1 4k
write -b 0 1
write -c 1 4k
write -b -z 0
write -bn 0 4k
write -bfn 0 4k
write -bfz 0 4k
write -un 0 4k
write -uP 3 -s 3 0 4k
write -n x 4k
write -s nofile 0 4k
write -s nofile x 4k
write -s pattern 0 4k@read -v 0 32
write -s pattern 0 2
write -s pattern 7 1000@read -v 0 64
write -s pattern 100k 200k
write -spattern 1 3
write -s pattern -P 4 0 4k
write -s pattern -z 0 4k
write -s /dev/null 0 4k
write -s . 0 4k
write -s
write -q 0 4k
write -qP7 0 5@read -P 7 0 5
write -C 0 4k
write -Cq 0 4k
write -p 0 4k
write -p 1 4k
write 1 1@read -v 0 16
write 1 0
write -z 1 1@read -v 0 16
write -z 0 3G
write -z 0 0
write -z 2M 4k
write -zn 0 3G
write -zn 0 2T
write -zn 0 8E
write -n 0 3G
write -n -P 3 0 3G
write 2M 4k
write 1020k 8k
write 1M 0
write 0 3G
write x 1
write 0 x
write 0 5q
write -x 0 4k
write -P 0x7e 0 4@write -P 0x7f 4 4@write -P 0x20 8 4@write -P 0x1f 12 4@read -v 0 16
w 0 4k
w
writev
writev 0
writev 0 4k 4k@read -P 0xcd 0 8k
writev 0 x 4k
writev x 4k
writev -P 5 0 4k 4k@readv -P 5 0 8k
writev -P 500 0 4k
writev -P 500 x 4k
writev -f 0 4k
writev -q 0 4k
writev -C 0 4k 4k
writev -z 0 4k
writev -z
writev -c 0 4k
writev 1 3 5 7@read -v 0 32
writev 1 512 512
writev 0 2G
writev 0 1G 1G 1G
writev 2M 4k
writev 0 0 0
aio_read
aio_read 0
aio_read 0 4k
aio_read 0 4k@aio_flush
aio_read 0 4k 4k@aio_flush
aio_read -P 0x41 0 4k@aio_flush
aio_read -P 99 0 4k@aio_flush
aio_read -P 99 0 4k@aio_flush@length
aio_read -q -P 99 0 4k@aio_flush
aio_read -v 0 16@aio_flush
aio_read -C 0 16@aio_flush
aio_read -Cq 0 1
aio_read -q 0 16@aio_flush
aio_read -q 0
aio_read -i 0 16@aio_flush
aio_read -i
aio_read -i -x 0 1
aio_read -x -i 0 1
aio_read -x 0 4k
aio_read x 4k
aio_read 0 x
aio_read -P 500 0 4k
aio_read -P
aio_read 2M 4k@aio_flush
aio_read 2M 4k
aio_read 0 2G@aio_flush
aio_read 0 0@aio_flush
aio_write
aio_write 0 4k
aio_write 0 4k@aio_flush
aio_write 0 4k 4k@aio_flush
aio_write -P 8 0 4k@aio_flush@read -P 8 0 4k
aio_write -z 0 4k@aio_flush@read -P 0 0 4k
aio_write -zu 0 4k@aio_flush
aio_write -u 0 4k@aio_flush
aio_write -u x 4k 4k
aio_write -z -P 4 0 4k@aio_flush@read -P 0 0 4k
aio_write -z 0 4k 4k@aio_flush
aio_write -zu x 4k 4k
aio_write -f 0 4k@aio_flush
aio_write -i 0 4k@aio_flush
aio_write -i
aio_write -n 0 4k
aio_write -C 0 4k@aio_flush
aio_write -q 0 4k@aio_flush
aio_write -z 2M 4k@aio_flush
aio_write -z 0 0@aio_flush
aio_write -z 0 9E
aio_write 2M 4k@aio_flush
aio_write x 4k
aio_write 0 x
aio_write -z x 4k
aio_write -z 0 x
aio_write -z 0 3G
aio_write 0 3G
aio_write -P 500 0 3G
aio_write 0 4k@sleep 300@length
aio_write 0 4k@quit
aio_write 0 4k@q@length
aio_write 0 4k@close@length
aio_write 0 4k@aio_flush@aio_write 4k 4k@aio_flush
aio_flush x
aio_flush -x
aio_flush
flush x
flush@flush
f
discard
discard 0
discard 0 4k@read -P 0 0 4k
discard -C 0 4k
discard -q 0 4k
discard -Cq 0 1
discard -z 0 4k
discard 0 x
discard x 0
discard 0 3G
discard 0 2147483136
discard 0 2G
discard 2M 4k
discard 1 1
discard 0 0
discard 0 4k 4k
d 0 4k
alloc
alloc 0
alloc 0 1M
alloc 0 x
alloc x
alloc 0 0
alloc 64k 64k
alloc 65k 1k
alloc 65k 1M
alloc 1 1
alloc 2M
alloc 2M 1k
alloc 0 100M
alloc 0 -1
alloc -1
alloc -x
alloc 0 1 2
alloc 512 8E
alloc 5000000 x
a 0
map
map x
map -x
m
length
length x
l
truncate
truncate x
truncate 2M@length@map
truncate 1000k@length
truncate 512@length
truncate 1000001@length@alloc 1000000@alloc 0 1000001@map
truncate -m off 2M@length
truncate -m falloc 512k
truncate -m falloc 2M@length
truncate -m full 3M@length
truncate -m metadata 4M
truncate -m bogus 4M
truncate -m bogus x
truncate -m bogus
truncate -m
truncate -x 4M
truncate -1
truncate 1M 2M@length
truncate 1 2 3@length
truncate 1 2 3 4
truncate 1M -m falloc
truncate -m off -x 4
truncate 8E
truncate 7E
truncate 0@length@map@read 0 1@alloc 0@info
t 1M
sleep
sleep x
sleep 1
sleep 1 2
sleep -1
sleep 0x10
sleep 010
sleep 08
sleep 1x
sleep 1.5
sleep +5
sleep ''
sleep 0x
sleep 1_0
sigraise
sigraise x
sigraise 1x
sigraise 1 2
sigraise 0
sigraise 999
sigraise 65
sigraise 66
sigraise -1
sigraise 2147483648
sigraise 99999999999999999999
sigraise 13@length
abort x
break
break a
break a b
break flush_to_disk A
break a b c
remove_break
remove_break a
remove_break a b
resume
resume a
resume a b
wait_break
wait_break a b
info
info x
i
help
?
help bogus
help read write
help q
help flush
help a
help -x
help s
quit x
q x
q@length
rv 0 4k
s 5
foo@length
length@foo
c@length
c x
close x
close x y
close@close
close@read 0 4k
close@length
close@map
close@alloc 0
close@truncate 3
close@flush
close@aio_flush
close@info
close@sleep 1
close@discard 0 4k
close@reopen
close@break a b
close@help
close@sigraise
close@open -o driver=raw image@length
close@open -o driver=raw,size=4096 image@length
close@open -o driver=raw -o size=4096 image@length
close@open -r -o driver=raw image@write 0 4k
close@open -n -o driver=raw image@write 0 4k
close@open -o driver=raw image -r@length@write 0 1
close@open -U -o driver=raw image
close@open -U -r -o driver=raw image@length
close@open -k -o driver=raw image
close@open -kn -o driver=raw image@length
close@open -i threads -o driver=raw image@length
close@open -i bogus image
close@open -t bogus image
close@open -t none -o driver=raw image@length
close@open -d bogus image
close@open -d unmap -o driver=raw image@discard 0 4k
close@open -x image@length
close@open image other
close@open -r -t bogus -x a b
close@open nofile@length
close@open -o driver=bogus image@length
close@open -o file.filename=image,driver=raw@length
close@open -o driver=raw,file.filename=image@length
close@open -o driver=null-co,size=1M,read-zeroes=on@length@read -P 0 0 4k
close@open -o file.driver=file,file.filename=image,driver=raw x@length
close@open json:{"driver":"raw","file":{"driver":"file","filename":"image"}}@length
close@open -s -o driver=raw image@write 0 4k@read -P 0xcd 0 4k
close@o -o driver=raw image@l
open
open image
o image
o
reopen
reopen x
reopen -r@write 0 4k
reopen -r@read 0 4k
reopen -w@write 0 4k
reopen -r -w
reopen -w -r
reopen -r -r
reopen -r x -w
reopen -c none@write 0 4k
reopen -c bogus
reopen -c bogus -x
reopen -c
reopen -r@reopen -w@write 0 4k
reopen -r -o read-only=on
reopen -c none -o cache.direct=on
reopen -o cache.direct=on@write 0 4k
reopen -o cache.writeback=off
reopen -o cache.no-flush=on
reopen -o bogus=on
reopen -o foo=1 -o bar=2
reopen -o driver=qcow2
reopen -o file.filename=x
reopen -o discard=unmap
reopen -o discard=bogus
reopen -o detect-zeroes=on
reopen -o node-name=x
reopen -o force-share=on
reopen -o auto-read-only=on
reopen -o copy-on-read=on
reopen -o read-only=maybe
reopen -o
reopen -x
reopen -o size=65536@length
reopen -r -c writethrough
reopen -o lazy-refcounts=on
%-r@write 0 4k
%-r@write -z 0 4k
%-r@write x y
%-r@write 0
%-r@writev 0 4k
%-r@writev
%-r@aio_write 0 4k
%-r@aio_write
%-r@discard 0 4k
%-r@discard 0
%-r@truncate 2M
%-r@truncate
%-r@flush
%-r@flush x
%-r@read 0 4k@map@info@length@alloc 0
%-r@reopen -w@write 0 4k
%-s@length@write 0 4k@read -P 0xcd 0 4k
%-s -r@length@write 0 4k
%-n@write 1 3@read -v 0 16
%-n@write 512 512@read 0 4k
%-t none@write 1 3@readv 1 7 9
%-t unsafe@write 1 3
%-t directsync@write 0 4k
%-t writethrough@write 0 4k
%-t off@length
%-d unmap@discard 0 4k
%-d ignore@discard 0 4k@read -P 0x41 0 4k
%-d on@discard 0 4k
%-d off@discard 0 4k@read -P 0x41 0 4k
%-m@length
%-k@length
%-k -n@length
%-i native@length
%-i threads@length
%-i io_uring@length
%-U@length
%-U -r@length
%-C -r@length
@length
 @length
read 0 4k; length
"""

SIZES = """
alloc 0
alloc 010
alloc 0x10
alloc 0X10
alloc 0x10k
alloc 0x1.5
alloc 0x1b
alloc 0xk
alloc 0x
alloc 1b
alloc 1B
alloc 1kb
alloc 1K
alloc 1m
alloc 1g
alloc 1T
alloc 1P
alloc 1E
alloc 1e
alloc 1e3
alloc 1e3k
alloc 1.5b
alloc 0.5
alloc .5k
alloc 1.
alloc 1.k
alloc 1.0
alloc 1.00001k
alloc 1.9999999999k
alloc 1.9999999999999999999999k
alloc 0.1k
alloc 0.3M
alloc +5
alloc +0x5
alloc 5_0
alloc 1,5k
alloc 1.5.5
alloc 1.-5
alloc 1.e5k
alloc 1.5e1k
alloc -0
alloc inf
alloc nan
alloc 007
alloc 08k
alloc 0.0000000000000000001k
alloc 1.5E
alloc 7.99E
alloc 7.9999999999999999E
alloc 8191.9P
alloc 1.0000000001
alloc 1.0b
alloc 0x7fffffffffffffff
alloc 0x8000000000000000
alloc 0x10000000000000000
alloc 18446744073709551616
alloc 1.0x5
alloc 0b1
alloc 0x1e
alloc 0x1p4
alloc 0x1m
alloc 1k1
alloc k
alloc .
alloc +
alloc 0.999k
alloc 0.001k
alloc 1.01k
alloc 2.7M
alloc 1.3G
alloc 0x400200
alloc 1073741825
read 0.1k 1.1k
write -z 0x1k 0.3k
"""

ON_QCOW2 = """
map
info
length
alloc 64k 64k
alloc 0 64k
alloc 0 128k
alloc 0 1M
alloc 60k 8k
alloc 1M
alloc 1000000 1M
read -P 0xcd 64k 128k
read -P 0 0 64k
read -P 0 512k 64k
read -v 65520 32
readv -P 0xcd 64k 1 2 3 4
write 0 64k@map
write 4k 4k@map@read -P 0 0 4k@read -P 0xcd 4k 4k
write -P 1 60k 8k@read -P 0 0 60k@read -P 1 60k 8k@read -P 0xcd 68k 60k
write -z 0 64k@read -P 0 0 64k
write -z 64k 64k@map@read -P 0 64k 64k@read -P 0xcd 128k 64k
write -zu 64k 64k@map
write -z 65k 1k@read -P 0 65k 1k@read -P 0xcd 64k 1k
write -zn 64k 64k
write -z 0 1M@read -P 0 0 1M
writev 100k 1 2 3 512 8k@read -P 0xcd 100k 8k
aio_write 256k 64k@aio_flush@map
aio_write -z 64k 64k@aio_flush@read -P 0 64k 64k
aio_read -P 0xcd 64k 64k@aio_flush
discard 64k 64k@read -P 0 64k 64k
discard 64k 1k@read -P 0xcd 65k 63k
discard 0 1M@read -P 0 0 1M
truncate 2M@length@read -P 0 1M 1M
truncate 512k@length@map
truncate 1000001
truncate 1000448@length@alloc 0 1M
truncate -m falloc 512k
truncate -m metadata 2M@length
truncate 0@length@map@read 0 1
truncate 3M@write -P 9 2M 64k@read -P 9 2M 64k@truncate 2M@truncate 3M@read -P 0 2M 64k
reopen -r@write 0 4k@reopen -w@write 0 4k
reopen -o lazy-refcounts=off
reopen -o cache-size=1M@read 0 4k
reopen -o cluster-size=4k
reopen -o pass-discard-request=off
reopen -o file.filename=r
reopen -o backing.file.filename=x
reopen -o driver=raw
reopen -o overlap-check=none
reopen -o size=5
reopen -c writethrough@write 0 4k
reopen -c unsafe@length
write 700k 4k@reopen -r@read -P 0xcd 700k 4k
write 700k 4k@close@open -o driver=qcow2 image@read -P 0xcd 700k 4k
break bogus A
read 1M 1
read 1020k 8k
write 1020k 8k
write 2M 4k
discard 2M 4k
%-r@map
%-r@info
%-r@alloc 0
%-r@write 0 64k
%-r@write -c 0 64k
%-r@write -b 0 512
%-r@truncate 4M
%-r@discard 0 64k
%-U@length
%-U -r@length
%-s@write 0 64k@length@read -P 0xcd 0 64k@read -P 0xcd 64k 64k
%-n@write 1 3@read -v 0 16
%-n@read -P 0xcd 64k 64k
%-d ignore@discard 64k 64k@read -P 0xcd 64k 64k
%-t directsync@write 300k 1k@read -P 0xcd 300k 1k
"""

COMPRESSING = """
write -c 0 64k@read -P 0xcd 0 64k
write -c 256k 128k@map@read -P 0xcd 256k 128k
write -cP 3 320k 64k@read -P 3 320k 64k
write -c 256k 4k
write -c 512 64k
write -c 256k 65024
write -c 1M 0
write -c 2M 64k
write -c -C 256k 64k
write -c -q 256k 64k
write -c -zu 256k 64k
write -c 1 64k
write -c 256k 64k@write 260k 4k@read -P 0xcd 256k 64k
"""

MACHINE_STATE = """
read -b 0 4k
read -b -P 0 0 4k
read -b 10M 4k
read -bC 0 4k
read -b 512 16
read -b 1 512
read -bp 1 512
read -bv 0 16
read -b 0 0
write -b 0 4k@read -b -P 0xcd 0 4k
write -b 0 512@read -b -P 0xcd 0 512@read -b -P 0 512 512@read 0 4k
write -b -P 9 64k 1k@read -b -P 9 64k 1k@read -b -P 0 65k 512@read -b -P 0 0 64k
write -b -P 9 1k 130k@read -b -P 9 1k 130k@read -b -P 0 0 1k@read -b -P 0 131k 32k
write -b -P 1 0 64k@write -b -P 2 512 512@read -b -P 1 1k 63k@read -b -P 2 512 512@read -b -P 1 0 512
write -b 600M 4k@read -b -P 0xcd 600M 4k
write -b 0 1
write -b 512 7
write -b 1 512
write -bp 1 512
write -bq 0 4k
write -bC 0 4k
write -bP 3 0 1k@map@length@reopen -r@read -bP 3 0 1k
%-r@read -b 0 512
"""

ON_OVERLAY = """
map
info
length
alloc 0 1M
alloc 0 2M
alloc 1M 1M
read -P 0x41 0 64k
read -P 0xcd 64k 64k
read -P 0 1M 1M
read -v 65520 32
write -P 7 0 4k@map@read -P 7 0 4k@read -P 0x41 4k 60k
write -P 7 1M 4k@read -P 0 1028k 60k
write -z 0 64k@read -P 0 0 64k@map
write -zu 0 64k@read -P 0 0 64k
write -z 1k 1k@read -P 0 1k 1k@read -P 0x41 0 1k
discard 64k 64k@read -P 0 64k 64k
truncate 3M@length@read -P 0 2M 1M
truncate 512k@truncate 1M@read -P 0 512k 512k
reopen -r@map
reopen -o backing=x
aio_read -P 0x41 0 64k@aio_flush
aio_write 0 1k@aio_flush@read -P 0x41 1k 63k
%-r@map
%-r@read -P 0x41 0 64k
%-s@write 0 64k@read -P 0xcd 0 128k@read -P 0x41 128k 64k
"""

ON_ODD = """
length
map
info
read 999k 1k
read -v 1000000 16
read 1000000 449
read 1000448 1
read -P 0 1000001 447
alloc 1000000
alloc 0 1M
write 0 1000@read -P 0xcd 0 1000
write 999936 512@read -P 0xcd 999936 512@length
discard 0 1000001@length
discard 999936 512
"""

WHOLE = r"""
--foo
-x
-c
-f
a b
-h
--help -c foo
--h
-rh --foo
-rnCsmkUh
--c length
--cm length
--n
--i
--s missing
--format
--d x
--t
--o
-Cx
--aio
--r=
--nocache=5 image
--format=raw image -c length
--forma raw image -c length
--read-only -f raw image -c length
image -f raw -c length
-f raw -fraw image -clength
-- -c
- -c length
nofile
-f raw nofile
-f raw -r nofile -c 'read 0 1'
-f bogus image
-f raw '' -c length
-f raw . -c length
-d bogus image
-t bogus image
-i bogus image
--aio=bogus image
-n -t bogus -f raw image
-nt writethrough -f raw image -c 'write 0 4k'
-t none -n -f raw image -c length
--image-opts driver=raw,file.filename=image -c 'read 0 4k'
--image-opts -f raw driver=raw,file.filename=image -c 'read 0 4k'
--image-opts driver=raw,file.filename=nofile
--image-opts driver=raw,file.driver=file,file.filename=nofile
--image-opts driver=raw,file.driver=file,file.filename=image -c length -c 'write 0 1'
--image-opts driver=null-co,size=1M,read-zeroes=on -c length -c 'read -P 0 0 1M'
--image-opts driver=null-co,size=1M,read-zeroes=on -c 'write 0 4k' -c 'aio_write 0 4k' -c aio_flush
--image-opts -c 'open driver=raw,file.filename=image' -c length
--image-opts -c 'open -o driver=raw image' -c length
--object secret,id=a,data=b -f raw image -c length
--object secret,id=a image
--object foo image
--object bogus,id=a image -c info
json:{"driver":"raw","file":{"driver":"file","filename":"image"}} -c length
-f raw json:{"driver":"raw","file":{"driver":"file","filename":"image"}} -c length
-c foo -c 'read 0 4k' -f raw image
-c 'read 0 4k' -c foo -f raw image
-c '' -c length -f raw image
-c length
-c close
-c info
-c reopen
-c flush
-c q
-c read
-c 'map x'
-c 'sleep 1'
-c sigraise
-c sleep
-c open
-c 'abort x'
-c 'quit x'
-c 'help x y'
-c 'open nofile' -c length
-c 'open -x image' -c length
-c 'open -r image other'
-c 'open -o driver=raw image' -c length
-c quit -c length
-c quit -c foo
-c foo -c quit
-c length -c 'sigraise 9' -f raw image
-c length -c 'sigraise 15' -f raw image
-c length -c 'sigraise 2' -f raw image
-c abort -f raw image
-c 'read 0 4k
length' -f raw image
-c 'alloc 0	512' -f raw image
-T foo -f raw image -c length
-m -k -n -f raw image -c length
"""
"""Each ends in another process: some of these commands end it."""

SCRIPTS = (
    "read 0 4k\n",
    "read 0 4k",
    "\n\nlength\n",
    "  \nlength\n",
    "# foo\nlength\n",
    "read 0 4k\r\nlength\r\n",
    "q\nlength\n",
    "foo\nlength\n",
    "length\nquit\n",
    "help\n",
    "length x\n",
    "read -P 77 0 4k\nlength\n",
    "close\nlength\nopen -o driver=raw image\nlength\n",
    "aio_write 0 4k\naio_flush\nread -P 0xcd 0 4k\n",
    "aio_write -q 0 4k\n",
    "",
)
"""Standard input."""

COPYING_ON_READ = """
%-C@read 512k 4k@map
%-C@read 600k 200k@map@alloc 0 1M
%-C@read -v 1M 16@map
%-C@read -P 0x41 0 64k@map@read -P 0x41 0 64k
%-C@aio_read 960k 4k@aio_flush@map
%-C@write 1100k 4k@map
%-C@read 64k 64k@map
%-C@readv 0 1k 1k@map
%-C@length
%-C@info
"""

NOT_VERSION_2 = (
    "write -z 64k 64k@map@read -P 0 64k 64k@read -P 0xcd 128k 64k",
    "write -zu 64k 64k@map",
    "write -zn 64k 64k",
    "write -z 0 1M@read -P 0 0 1M",
    "aio_write -z 64k 64k@aio_flush@read -P 0 64k 64k",
)
"""Version 2 has no zero clusters: qemu-io writes zeros out, this project's program takes clusters off the map where no
backing file shows."""

ON_IMAGES = {
    "raw": (ON_RAW, SIZES),
    "raw-odd": (ON_ODD,),
    "qcow2": (ON_QCOW2, COMPRESSING, MACHINE_STATE),
    "qcow2-v2": (ON_QCOW2, COMPRESSING, MACHINE_STATE),
    "qcow2-subclusters": (ON_QCOW2, COMPRESSING, MACHINE_STATE),
    "qcow2-overlay": (ON_OVERLAY, COPYING_ON_READ),
}


def lines(text: str) -> list[str]:
    """The lines of one of the tables."""
    return [line for line in text.strip("\n").split("\n") if line]


def whole() -> list[str]:
    """The command lines of ``WHOLE``; one has a line break in it."""
    return WHOLE.strip("\n").replace("4k\nlength", "4k\0length").split("\n")


def cases() -> list[tuple[str, str]]:
    """``(image, line)`` of all that is done to images."""
    found = [(image, line) for image, tables in ON_IMAGES.items() for table in tables for line in lines(table)]
    return [(image, line) for image, line in found if not (image == "qcow2-v2" and line in NOT_VERSION_2)]


def count() -> int:
    """How many command lines are compared."""
    return len(cases()) + len(whole()) + len(SCRIPTS)


if __name__ == "__main__":
    print(count())
